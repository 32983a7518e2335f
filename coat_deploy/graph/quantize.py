"""Weights as 8-bit integers."""

from typing import Any

import numpy as np
import numpy.typing as npt

MOST = 64
"""The largest integer of a weight. x86 processors without VNNI add two products of an unsigned and
a signed byte up in 16 bits, and cut off what is beyond: 2 * 255 * 64 is not, 2 * 255 * 65 is."""


def quantize_rows(
    weight: npt.NDArray[np.floating[Any]],
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.floating[Any]]]:
    """Return integers (R, C) up to `MOST` and a scale a row (R,), the largest entry's.

    `scale * integers` differs from `weight` by at most half a scale. Symmetric, so that a
    product needs no correction for a weight's zero point; by rows, since those of one layer
    differ in size by more than the integers' range can bear.
    """
    scale = np.abs(weight).max(axis=1) / MOST
    scale[scale == 0] = 1  # a row of zeros: any scale will do
    return np.rint(weight / scale[:, None]).astype(np.int8), scale
