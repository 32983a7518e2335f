"""How images of a batch are divided among threads.

Images computed at once, each by as few threads as there are, keep what they compute in the caches
and wait for each other nowhere: quicker than all of them layer by layer
(docs/decisions/0010-known-shapes.md, 0011-image-by-image.md).
"""


def division(threads: int, images: int) -> int:
    """Return among how many requests at once the threads are divided.

    As many as there are images for, and so that all get as many threads.
    """
    return max(n for n in range(1, min(threads, images) + 1) if threads % n == 0)


def rounds(threads: int, images: int) -> list[tuple[int, int]]:
    """Return how many images are computed at once, and for how many images: one such pair or two.

    The second is for what the first leaves over, for which more threads an image are free.
    """
    at_once = division(threads, images)
    rest = images % at_once
    found = [(at_once, images - rest)]
    return found + [(division(threads, rest), rest)] if rest else found
