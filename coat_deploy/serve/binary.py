"""The protocol's binary extension: JSON in front, the tensors' bytes behind it, in their order.

    [JSON, Inference-Header-Content-Length bytes] [input 0] [input 1] ...

Numbers are little-endian; an element of BYTES is its length in four bytes, and the bytes.
With a length of 0 there is no JSON, and the body is the one input.
"""

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from coat_deploy.errors import RequestError
from coat_deploy.serve.requests import BYTES, DATATYPES, FP32, Tensor
from coat_deploy.serve.tensors_json import InferDocument, TensorHead, read_data

HEADER_LENGTH = "inference-header-content-length"
MAX_HEADER_LENGTH = 10**11 - 1
_LENGTH = struct.Struct("<I")


def header_length(value: str | None) -> int | None:
    """Return the length that the header says; None without one. Raises RequestError."""
    if value is None:
        return None
    if not (
        value.isascii() and value.isdigit() and len(value) < 20 and int(value) <= MAX_HEADER_LENGTH
    ):
        raise RequestError(f"{HEADER_LENGTH}: must be a whole number (got '{value:.40}').")
    return int(value)


def split(body: memoryview, length: int | None) -> tuple[memoryview, memoryview]:
    """Return the JSON and what is behind it. Raises RequestError for a length beyond the end."""
    if length is None:
        return body, body[:0]
    if length > len(body):
        raise RequestError(
            f"{HEADER_LENGTH}: is beyond the end of the body (got {length}, expected at most "
            f"{len(body)})."
        )
    return body[:length], body[length:]


def read_inputs(document: InferDocument, tail: memoryview) -> tuple[Tensor, ...]:
    """Return the inputs, of the document or behind it. Raises RequestError."""
    sizes = [head.binary_size for head in document.inputs]
    needed = sum(size or 0 for size in sizes)
    if needed != len(tail):
        raise RequestError(
            f"the binary data has another length than the inputs say (got {len(tail)} bytes, "
            f"expected {needed})."
        )
    tensors, start = [], 0
    for head, size in zip(document.inputs, sizes, strict=True):
        if size is None:
            tensors.append(read_data(head))
            continue
        if head.data is not None:
            raise RequestError(f"input '{head.name}': has both 'data' and 'binary_data_size'.")
        tensors.append(read_tensor(head, tail[start : start + size]))
        start += size
    return tuple(tensors)


def read_tensor(head: TensorHead, content: memoryview) -> Tensor:
    """Return an input from its bytes, without copying numbers. Raises RequestError."""
    if head.datatype == BYTES:
        items = _items(head, content)
        return Tensor(head.name, BYTES, head.shape, items)
    dtype = DATATYPES[head.datatype]
    if len(content) != head.elements * dtype.itemsize:
        raise RequestError(
            f"input '{head.name}': 'binary_data_size' does not fit the shape (got {len(content)} "
            f"bytes, expected {head.elements * dtype.itemsize} for {head.datatype} "
            f"{list(head.shape)})."
        )
    values = np.frombuffer(content, dtype).reshape(head.shape)
    return Tensor(head.name, head.datatype, head.shape, values)


def raw_images(body: memoryview, name: str, size: tuple[int, int]) -> Tensor | None:
    """Return a whole body as float32 images of a fixed (height, width), if it can be such."""
    one = 3 * size[0] * size[1] * DATATYPES[FP32].itemsize
    if not len(body) or len(body) % one:
        return None
    shape = (len(body) // one, 3, *size)
    return Tensor(name, FP32, shape, np.frombuffer(body, DATATYPES[FP32]).reshape(shape))


def tensor_bytes(tensor: Tensor) -> bytes:
    """Return an output's bytes."""
    if isinstance(tensor.data, np.ndarray):
        return np.ascontiguousarray(tensor.data, DATATYPES[tensor.datatype]).tobytes()
    return pack_items(tensor.data)


def pack_items(items: Iterable[bytes]) -> bytes:
    """Return elements of BYTES, each behind its length."""
    return b"".join(_LENGTH.pack(len(item)) + item for item in items)


def _items(head: TensorHead, content: memoryview) -> Sequence[bytes]:
    items: list[bytes] = []
    start = 0
    while start < len(content) and len(items) < head.elements:
        if start + _LENGTH.size > len(content):
            break
        (length,) = _LENGTH.unpack_from(content, start)
        start += _LENGTH.size + length
        items.append(bytes(content[start - length : start]))
    if start != len(content) or len(items) != head.elements:
        raise RequestError(
            f"input '{head.name}': its bytes are not {head.elements} elements of BYTES, each "
            "behind its length in four bytes."
        )
    return items
