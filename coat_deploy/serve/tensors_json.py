"""The protocol's JSON: requests to infer read strictly, responses written.

Every rule that a document can break has a sentence; what is optional may also be null. Data of a
tensor may be flat or nested, or, in the binary extension, stand behind the document (`binary.py`).
"""

import base64
import binascii
import itertools
import math
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson

from coat_deploy.errors import RequestError, unknown_name
from coat_deploy.serve.requests import BYTES, DATATYPES, RequestedOutput, Tensor

MAX_TENSORS = 16
MAX_DIMENSIONS = 8
MAX_LENGTH = (1 << 40) - 1
MAX_ELEMENTS = 1 << 40
"""More than any body holds; beyond, numpy knows no shapes, not even of nothing."""
MAX_NAME = 256


@dataclass(frozen=True)
class TensorHead:
    """What a document says of an input before its data is looked at."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    parameters: Mapping[str, Any]
    data: Any

    def __post_init__(self) -> None:
        # A length of 0 hides what the others come to.
        if math.prod(max(1, length) for length in self.shape) > MAX_ELEMENTS:
            raise RequestError(f"input '{self.name}': no pixels are of so large a shape.")

    @property
    def elements(self) -> int:
        """Number of elements that the shape has."""
        return math.prod(self.shape)

    def check_images(self, most: int) -> None:
        """Raise RequestError for more encoded images than that, before any is looked at.

        Of nothing but empty ones a body holds millions, and each would become an object.
        """
        if self.datatype == BYTES and self.elements > most:
            raise RequestError(
                f"input '{self.name}': too many images (got {self.elements}, expected 1 to "
                f"{most}). Divide them among requests.",
                "too_large",
            )

    @property
    def binary_size(self) -> int | None:
        """Bytes of the data behind the document; None where it is in the document."""
        size = self.parameters.get("binary_data_size")
        if size is None:
            return None
        if type(size) is not int or size < 0:
            raise RequestError(
                f"input '{self.name}': 'binary_data_size' must be a whole number "
                f"(got {size!r:.40})."
            )
        return size


@dataclass(frozen=True)
class InferDocument:
    """A request to infer, as its JSON says. `binary` names the outputs wanted in binary."""

    id: str
    inputs: tuple[TensorHead, ...]
    outputs: tuple[RequestedOutput, ...]
    binary: frozenset[str]
    all_binary: bool
    timeout_us: int | None

    def wants_binary(self, name: str) -> bool:
        """Return whether an output is wanted in binary."""
        return name in self.binary or (self.all_binary and not self.outputs)


def read_object(content: memoryview, most: int, what: str = "the body") -> dict[str, Any]:
    """Return the JSON object in a body, of so many bytes at most. Raises RequestError."""
    if len(content) > most:
        raise RequestError(
            f"{what} is too large for JSON (got {len(content)} bytes, expected at most {most}). "
            "Send tensors in binary, or encoded images.",
            "too_large",
        )
    try:
        document = orjson.loads(content)
    except orjson.JSONDecodeError as error:
        text = bytes(content)
        hint = " JSON has no NaN or infinity." if b"NaN" in text or b"Infinity" in text else ""
        raise RequestError(f"{what} is not JSON ({error!s:.200}).{hint}") from error
    if not isinstance(document, dict):
        raise RequestError(f"{what} must be a JSON object (got {_kind(document)}).")
    return document


def read_infer(document: Mapping[str, Any], most: int) -> InferDocument:
    """Return a request to infer, of so many encoded images at most.

    Raises: RequestError with the rule that it breaks.
    """
    parameters = parameters_of(document, "the request")
    inputs = tuple(_input(item) for item in _items(document, "inputs", required=True))
    for head in inputs:
        head.check_images(most)
    outputs = [_output(item) for item in _items(document, "outputs")]
    named = [output.name for output, _ in outputs]
    if len(set(named)) < len(named):
        raise RequestError("'outputs' names an output twice. Name it once.")
    every = flag(parameters, "binary_data_output", "the request") or False
    wanted = {output.name: every if binary is None else binary for output, binary in outputs}
    timeout = parameters.get("timeout")
    if timeout is not None and (type(timeout) is not int or timeout < 0):
        raise RequestError(f"'timeout' must be whole microseconds (got {timeout!r:.40}).")
    return InferDocument(
        id=_text(document, "id", "the request", ""),
        inputs=inputs,
        outputs=tuple(output for output, _ in outputs),
        binary=frozenset(name for name, binary in wanted.items() if binary),
        all_binary=every,
        timeout_us=timeout or None,
    )


def read_data(head: TensorHead) -> Tensor:
    """Return an input whose data is in the document. Raises RequestError."""
    if head.data is None:
        raise RequestError(
            f"input '{head.name}': has no data. Send 'data', or 'binary_data_size' and the bytes."
        )
    if not isinstance(head.data, list):
        raise RequestError(
            f"input '{head.name}': 'data' must be an array (got {_kind(head.data)})."
        )
    if head.datatype == BYTES:
        return Tensor(head.name, BYTES, head.shape, _texts(head))
    return Tensor(head.name, head.datatype, head.shape, _numbers(head))


def write_tensor(tensor: Tensor) -> dict[str, Any]:
    """Return an output with its data, flat."""
    data: Sequence[Any] | npt.NDArray[Any]
    if isinstance(tensor.data, np.ndarray):
        data = tensor.data.ravel()
    else:
        data = [item.decode(errors="replace") for item in tensor.data]
    return {**write_head(tensor), "data": data}


def write_head(tensor: Tensor) -> dict[str, Any]:
    """Return an output without its data."""
    return {"name": tensor.name, "datatype": tensor.datatype, "shape": list(tensor.shape)}


def _items(document: Mapping[str, Any], key: str, required: bool = False) -> list[dict[str, Any]]:
    items = document.get(key)
    if items is None and not required:
        return []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise RequestError(f"'{key}' must be an array of objects (got {_kind(items)}).")
    if len(items) > MAX_TENSORS:
        raise RequestError(f"'{key}': too many (got {len(items)}, expected {MAX_TENSORS} at most).")
    return items


def _text(document: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = document.get(key)
    if value is None:
        value = default
    if not isinstance(value, str) or len(value) > MAX_NAME:
        raise RequestError(
            f"{where}: '{key}' must be a text of {MAX_NAME} characters at most (got {value!r:.60})."
        )
    return value


def parameters_of(document: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return a document's parameters, or those of a part of it. Raises RequestError."""
    parameters = document.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise RequestError(f"{where}: 'parameters' must be an object (got {_kind(parameters)}).")
    return parameters


def flag(document: Mapping[str, Any], key: str, where: str) -> bool | None:
    """Return what is said under a key; None where nothing is. Raises RequestError."""
    value = document.get(key)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"{where}: '{key}' must be true or false (got {value!r:.40}).")
    return value


def _input(item: Mapping[str, Any]) -> TensorHead:
    name = _text(item, "name", "an input")
    datatype = _text(item, "datatype", f"input '{name}'")
    known = (*DATATYPES, BYTES)
    if datatype not in known:
        raise RequestError(f"input '{name}': {unknown_name('datatype', datatype[:40], known)}")
    shape = item.get("shape")
    sound = isinstance(shape, list) and len(shape) <= MAX_DIMENSIONS
    if not sound or not all(type(n) is int and 0 <= n <= MAX_LENGTH for n in shape or ()):
        raise RequestError(
            f"input '{name}': 'shape' must be an array of whole numbers (got {shape!r:.60})."
        )
    assert isinstance(shape, list)
    parameters = parameters_of(item, f"input '{name}'")
    _text(parameters, "content_type", f"input '{name}'", "")
    return TensorHead(name, datatype, tuple(shape), parameters, item.get("data"))


def _output(item: Mapping[str, Any]) -> tuple[RequestedOutput, bool | None]:
    """Return what is wanted, and whether in binary; None leaves that to the request."""
    name = _text(item, "name", "an output")
    parameters = parameters_of(item, f"output '{name}'")
    classes = parameters.get("classification")
    classes = 0 if classes is None else classes
    if type(classes) is not int or classes < 0:
        raise RequestError(
            f"output '{name}': 'classification' must be a whole number (got {classes!r:.40})."
        )
    return RequestedOutput(name, classes), flag(parameters, "binary_data", f"output '{name}'")


def _numbers(head: TensorHead) -> npt.NDArray[Any]:
    dtype = DATATYPES[head.datatype]
    flat, found = _flat(head)
    try:
        values = _values(flat, dtype.kind)
    except (TypeError, OverflowError):
        raise RequestError(
            f"input '{head.name}': 'data' holds something else than {head.datatype} (numbers out "
            "of range, texts or nulls, or rows that differ in length)."
        ) from None
    _check_shape(head, found)
    if dtype.kind in "iu" and values.size:
        limits = np.iinfo(dtype)
        if values.dtype.kind == "f" or values.min() < limits.min or values.max() > limits.max:
            raise RequestError(
                f"input '{head.name}': 'data' is out of the range of {head.datatype}."
            )
    with np.errstate(over="ignore"):  # infinity is told where the outputs are looked at
        return values.astype(dtype).reshape(head.shape)


def _values(flat: list[Any], kind: str) -> npt.NDArray[Any]:
    """Return numbers, for an array of a kind of numpy's.

    numpy alone would make texts of all where one is a text, each as long as that.
    Raises: TypeError, OverflowError for what else is among them.
    """
    if kind == "f":
        return np.asarray(array("d", flat))
    if not set(map(type, flat)) <= ({bool} if kind == "b" else {int, float}):
        raise TypeError("not all of them are numbers")
    values = np.asarray(flat)
    if values.dtype.kind == "O":
        raise OverflowError("not all of them fit into 64 bits")
    return values


def _texts(head: TensorHead) -> list[bytes]:
    flat, found = _flat(head)
    if not all(isinstance(item, str) for item in flat) or len(flat) != head.elements:
        raise RequestError(
            f"input '{head.name}': 'data' must be {head.elements} texts, for the shape "
            f"{list(head.shape)}."
        )
    _check_shape(head, found)
    content: Callable[[str], bytes] = str.encode
    if head.parameters.get("content_type") == "base64":
        content = decode_base64
    return [content(item) for item in flat]


def _flat(head: TensorHead) -> tuple[list[Any], list[int]]:
    """Return the data in one list, and the shape it had. Raises RequestError where it has none."""
    flat: list[Any] = head.data
    found = [len(flat)]
    while flat and isinstance(flat[0], list):
        lengths = {len(row) if isinstance(row, list) else -1 for row in flat}
        if len(lengths) > 1 or len(found) == MAX_DIMENSIONS:
            what = "rows differ in length" if len(lengths) > 1 else "it is nested too deep"
            raise RequestError(f"input '{head.name}': 'data' is of no shape: {what}.")
        found += lengths
        flat = list(itertools.chain.from_iterable(flat))
    return flat, found


def _check_shape(head: TensorHead, found: list[int]) -> None:
    if tuple(found) != head.shape and found != [head.elements]:
        raise RequestError(
            f"input '{head.name}': 'data' does not have the shape (got {found}, expected "
            f"{list(head.shape)}, or {head.elements} flat)."
        )


def decode_base64(text: str) -> bytes:
    """Return the bytes of a text in base64. Raises RequestError."""
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"the text is not base64 ({error!s:.80}). Encode it again.") from error


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "an array", str: "a text", bool: "true or false"}
    return "nothing" if value is None else names.get(type(value), "a number")
