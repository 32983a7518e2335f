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


def lanes(heads: int, head_channels: int) -> int:
    """Return the power of two that holds so many heads, wherever the first begins.

    Lanes begin at a multiple of `ALIGNED` channels, before the first head where its own are odd.
    """
    before = ALIGNED - math.gcd(head_channels, ALIGNED)
    return max(LEAST_LANES, 1 << (heads * head_channels + before - 1).bit_length())


def heads_together(head_channels: int, kinds: Sequence[int]) -> int:
    """Return how many heads make a group, where groups stay within kinds of so many heads each.

    The fewest lanes in all; of equals the widest group, which reads memory in longer pieces.
    """
    fitting = [n for n in range(1, max(kinds) + 1) if lanes(n, head_channels) <= MOST_LANES]
    return min(
        fitting[::-1] or [1],
        key=lambda heads: num_groups(heads, kinds) * lanes(heads, head_channels),
    )


def num_groups(heads: int, kinds: Sequence[int]) -> int:
    """Return how many groups of so many heads the kinds make."""
    return sum(-(-kind // heads) for kind in kinds)


def window_kinds(windows: Sequence[int]) -> list[tuple[int, int]]:
    """Return (window, number of heads) of neighbouring heads, given the window of each head."""
    return [(window, len(list(heads))) for window, heads in groupby(windows)]
