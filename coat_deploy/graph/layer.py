"""A linear layer as it is handed around before it is written."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Layer:
    """A linear layer `x W^T + b`: `weight` (C_out, C_in) as PyTorch keeps it, `bias` (C_out,).

    `int8`: its product is taken of 8-bit integers.
    """

    weight: Floats
    bias: Floats | None
    int8: bool = False
