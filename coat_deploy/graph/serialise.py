"""Turn a graph into the bytes of its file, or files."""

from onnx import ModelProto, TensorProto
from onnx.external_data_helper import set_external_data

EXTERNAL_DATA_BYTES = 1_500_000_000
"""Above this weights go to a second file: a protobuf message ends at 2 GiB."""

MIN_TENSOR_BYTES = 1024
"""Smaller tensors stay in the graph, where shape inference can read them."""


def serialise(model: ModelProto, file: str, limit: int = EXTERNAL_DATA_BYTES) -> dict[str, bytes]:
    """Return the content of each file by name: `file`; and `file.data` for weights beyond `limit`.

    `limit` is in bytes. `model` stays as it is.
    """
    # Summed, because protobuf cannot even measure a message beyond 2 GiB.
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) <= limit:
        return {file: model.SerializeToString()}
    whole, model = model, ModelProto()
    model.CopyFrom(whole)
    data = bytearray()
    for tensor in model.graph.initializer:
        if len(tensor.raw_data) >= MIN_TENSOR_BYTES:
            data += _move_out(tensor, f"{file}.data", len(data))
    return {file: model.SerializeToString(), f"{file}.data": bytes(data)}


def _move_out(tensor: TensorProto, location: str, offset: int) -> bytes:
    """Return a tensor's bytes, after pointing it to them at `offset` of `location`."""
    content = tensor.raw_data
    set_external_data(tensor, location, offset, len(content))
    tensor.ClearField("raw_data")
    return content
