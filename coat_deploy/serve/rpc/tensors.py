"""Requests to infer read from messages strictly, and responses written.

Data of inputs is in `raw_input_contents`, or typed in each input's `contents`; the answer's is in
the form of the request's.
"""

import time
from typing import Any

import numpy as np
import numpy.typing as npt
from google.protobuf.message import DecodeError

from coat_deploy.errors import RequestError, unknown_name
from coat_deploy.serve.binary import read_tensor, tensor_bytes
from coat_deploy.serve.options import Limits
from coat_deploy.serve.requests import (
    BYTES,
    DATATYPES,
    FP32,
    InferRequest,
    InferResponse,
    RequestedOutput,
    Tensor,
)
from coat_deploy.serve.rpc.messages import InferReply, InferRequestMessage
from coat_deploy.serve.rpc.wire import split
from coat_deploy.serve.tensors_json import MAX_DIMENSIONS, MAX_NAME, MAX_TENSORS, TensorHead

CONTENTS = {FP32: "fp32_contents", BYTES: "bytes_contents"}
"""Where typed data of a datatype is; others are taken as raw contents alone."""
_SHARED_MEMORY = "shared_memory_region"


def read_infer(
    content: bytes, limits: Limits, deadline: float | None = None
) -> tuple[InferRequest, bool]:
    """Return a request to infer, and whether its data is typed. Raises RequestError.

    `deadline`: until when its caller waits, in seconds of `time.monotonic`.
    """
    rest, raw = split(content)
    if len(rest) > limits.json_bytes:
        raise RequestError(
            f"the message without its raw contents is too large (got {len(rest)} bytes, expected "
            f"at most {limits.json_bytes}). Send tensors as raw_input_contents.",
            "too_large",
        )
    try:
        message = InferRequestMessage.FromString(rest)
    except DecodeError as error:
        raise RequestError(f"the message is not a ModelInferRequest ({error!s:.100}).") from error
    _check_counts(message, raw)
    heads = [_head(item) for item in message.inputs]
    for head in heads:
        head.check_images(limits.batch)
    if raw:
        inputs = [_raw(head, item) for head, item in zip(heads, raw, strict=True)]
    else:
        inputs = [
            _typed(head, item.contents) for head, item in zip(heads, message.inputs, strict=True)
        ]
    request = InferRequest(
        message.model_name,
        tuple(inputs),
        message.model_version or None,
        message.id,
        tuple(_output(item) for item in message.outputs),
        _earlier(deadline, _whole(message.parameters, "timeout", "the request")),
    )
    return request, not raw


def write_infer(response: InferResponse, typed: bool) -> Any:
    """Return the message of a response."""
    reply = InferReply(model_name=response.model, model_version=response.version, id=response.id)
    for tensor in response.outputs:
        output = reply.outputs.add(name=tensor.name, datatype=tensor.datatype, shape=tensor.shape)
        if not typed:
            reply.raw_output_contents.append(tensor_bytes(tensor))
        elif isinstance(tensor.data, np.ndarray):
            output.contents.fp32_contents.extend(tensor.data.ravel().tolist())
        else:
            output.contents.bytes_contents.extend(tensor.data)
    return reply


def _check_counts(message: Any, raw: list[memoryview]) -> None:
    for what, count in (("inputs", len(message.inputs)), ("outputs", len(message.outputs))):
        if count > MAX_TENSORS:
            raise RequestError(f"'{what}': too many (got {count}, expected {MAX_TENSORS} at most).")
    if len(message.id) > MAX_NAME:
        raise RequestError(
            f"'id': too long (got {len(message.id)} characters, expected {MAX_NAME} at most)."
        )
    if raw and len(raw) != len(message.inputs):
        raise RequestError(
            f"'raw_input_contents': not one for each input (got {len(raw)} for "
            f"{len(message.inputs)} inputs)."
        )
    if raw and any(item.HasField("contents") for item in message.inputs):
        raise RequestError("inputs have both 'contents' and 'raw_input_contents'. Send one.")
    names = [output.name for output in message.outputs]
    if len(set(names)) < len(names):
        raise RequestError("'outputs' names an output twice. Name it once.")


def _head(item: Any) -> TensorHead:
    name = item.name[:MAX_NAME]
    known = (*DATATYPES, BYTES)
    if item.datatype not in known:
        raise RequestError(f"input '{name}': {unknown_name('datatype', item.datatype[:40], known)}")
    if len(item.shape) > MAX_DIMENSIONS or any(length < 0 for length in item.shape):
        raise RequestError(
            f"input '{name}': 'shape' must be {MAX_DIMENSIONS} whole numbers at most, none below 0 "
            f"(got {list(item.shape[:MAX_DIMENSIONS])})."
        )
    _refuse_shared_memory(item, f"input '{name}'")
    return TensorHead(name, item.datatype, tuple(item.shape), {}, None)


def _output(item: Any) -> RequestedOutput:
    where = f"output '{item.name[:MAX_NAME]}'"
    _refuse_shared_memory(item, where)
    return RequestedOutput(item.name, _whole(item.parameters, "classification", where) or 0)


def _refuse_shared_memory(item: Any, where: str) -> None:
    if _SHARED_MEMORY in item.parameters:
        raise RequestError(
            f"{where}: shared memory is not spoken here. Send the data.", "unsupported"
        )


def _raw(head: TensorHead, content: memoryview) -> Tensor:
    if head.datatype != BYTES:
        expected = head.elements * DATATYPES[head.datatype].itemsize
        if len(content) != expected:
            raise RequestError(
                f"input '{head.name}': its raw contents do not fit the shape (got {len(content)} "
                f"bytes, expected {expected} for {head.datatype} {list(head.shape)})."
            )
    return read_tensor(head, content)


def _typed(head: TensorHead, contents: Any) -> Tensor:
    if head.datatype not in CONTENTS:
        raise RequestError(
            f"input '{head.name}': {head.datatype} is taken as raw_input_contents alone."
        )
    wanted = CONTENTS[head.datatype]
    found = [field.name for field, _ in contents.ListFields()]
    if found not in ([], [wanted]):
        raise RequestError(
            f"input '{head.name}': its contents are not of its datatype (got "
            f"{' and '.join(found)}, expected {wanted} for {head.datatype})."
        )
    values = getattr(contents, wanted)
    if len(values) != head.elements:
        raise RequestError(
            f"input '{head.name}': its contents do not fit the shape (got {len(values)} elements, "
            f"expected {head.elements} for {list(head.shape)})."
        )
    if head.datatype == BYTES:
        return Tensor(head.name, BYTES, head.shape, list(values))
    return Tensor(head.name, head.datatype, head.shape, _numbers(head, contents))


def _numbers(head: TensorHead, contents: Any) -> npt.NDArray[Any]:
    """Return the one field that `contents` have as an array.

    As a message they are a tag, a length and the numbers; making each of them an object of Python
    would take longer than the model.
    """
    contents.DiscardUnknownFields()
    packed = contents.SerializeToString()
    dtype = DATATYPES[head.datatype]
    start = len(packed) - head.elements * dtype.itemsize
    values = np.frombuffer(memoryview(packed)[start:], dtype).reshape(head.shape)
    return np.require(values, requirements="A")


def _whole(parameters: Any, key: str, where: str) -> int | None:
    if key not in parameters:
        return None
    value = parameters[key]
    choice = value.WhichOneof("parameter_choice")
    number = getattr(value, choice) if choice in ("int64_param", "uint64_param") else -1
    if number < 0:
        raise RequestError(
            f"{where}: '{key}' must be a whole number, as int64_param (got {choice or 'nothing'}"
            f"{f' {number}' if choice == 'int64_param' else ''})."
        )
    return int(number)


def _earlier(deadline: float | None, timeout_us: int | None) -> float | None:
    """Return the earlier of a call's deadline and that of its parameter; 0 there means none."""
    if not timeout_us:
        return deadline
    own = time.monotonic() + timeout_us / 1e6
    return own if deadline is None else min(deadline, own)
