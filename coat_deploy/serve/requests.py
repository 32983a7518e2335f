"""What is asked and answered, whatever protocol carries it.

The words are those of the Open Inference Protocol: tensors with a name, a datatype and a shape.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

BYTES, FP32 = "BYTES", "FP32"

DATATYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    FP32: np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
"""The protocol's datatypes with elements of a fixed size; `BYTES` has none, BF16 is not numpy's."""


@dataclass(frozen=True, eq=False)
class Tensor:
    """An input or output. `data` has the `shape`; of `BYTES` it is a flat sequence of bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: npt.NDArray[Any] | Sequence[bytes]


@dataclass(frozen=True)
class RequestedOutput:
    """An output that is wanted; with `classes` the likeliest so many, not the values."""

    name: str
    classes: int = 0


@dataclass(frozen=True, eq=False)
class InferRequest:
    """A request to infer.

    `outputs`: none means all, as values. `deadline`: when to give up, in seconds of
    `time.monotonic`; None leaves it to the server. `parameters` are those that no rule of the
    protocol gives a meaning.
    """

    model: str
    inputs: tuple[Tensor, ...]
    version: str | None = None
    id: str = ""
    outputs: tuple[RequestedOutput, ...] = ()
    deadline: float | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class InferResponse:
    """The answer, its outputs in the order asked for."""

    model: str
    version: str
    id: str
    outputs: tuple[Tensor, ...]
