"""How many heads a program takes together: the fewest lanes that compute nothing.

Lanes come in powers of two, heads in any width: three heads of 19 channels fill 57 of 64 lanes,
one fills 19 of 32.
"""

import math
from collections.abc import Sequence
from itertools import groupby

LEAST_LANES, MOST_LANES = 16, 64
"""What the matrix units multiply at least, and what registers hold of a context comfortably."""

ALIGNED = 8
"""Channels that begin where memory is read in long pieces; `kernels.ALIGNED`."""

NUM_KINDS = 3
"""Kinds of windows that a launch tells apart."""

WINDOWS = (3, 5, 7)
"""Widths of windows that `kernels.window_kernel` slides."""


def lanes(heads: int, head_channels: int) -> int:
    """Return the power of two that holds so many heads, wherever the first begins.

    Lanes begin at a multiple of `ALIGNED` channels, before the first head where its own are odd.
    """
    before = ALIGNED - math.gcd(head_channels, ALIGNED)
    return max(LEAST_LANES, 1 << (heads * head_channels + before - 1).bit_length())


def heads_together(head_channels: int, num_heads: int) -> int:
    """Return how many heads make a group.

    The fewest lanes in all; of equals the widest group, which reads memory in longer pieces.
    """
    fitting = [n for n in range(1, num_heads + 1) if lanes(n, head_channels) <= MOST_LANES]
    return min(
        fitting[::-1] or [1],
        key=lambda heads: -(-num_heads // heads) * lanes(heads, head_channels),
    )


def window_blocks(windows: Sequence[int], head_channels: int, wide: int) -> list[tuple[int, int]]:
    """Return (window, number of blocks) of neighbouring blocks of `wide` channels.

    windows: of each head. A block that several heads share takes the widest of theirs.
    """
    channels = len(windows) * head_channels
    widest = [
        max(windows[first // head_channels : -(-min(first + wide, channels) // head_channels)])
        for first in range(0, channels, wide)
    ]
    return [(window, len(list(blocks))) for window, blocks in groupby(widest)]
