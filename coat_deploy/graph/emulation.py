"""A graph of fp16 or bf16 in float32 kernels that round: what a GPU computes, on a CPU.

Tensor cores multiply numbers of a low type and add the products up in float32; what is rounded is
the result. Runtimes for CPUs do other things: they lack the type, add up in it, or leave rounding
out. So every value that the graph has in a low type is float32 here, and rounded to it.
"""

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

LOW = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

MOVING = (
    "Concat", "Expand", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze",
    "Tile", "Transpose", "Unsqueeze",
)  # fmt: skip
"""Operators whose outputs are numbers of their inputs: nothing is left to round."""


def emulate(model: ModelProto) -> ModelProto:
    """Return the graph in float32, with every value rounded that has a low type in `model`.

    A runtime must compute it node by node: one that optimises may take rounding out again.
    Raises: onnx's errors for a graph whose types cannot be inferred.
    """
    types = _types(model)
    emulated = ModelProto()
    emulated.CopyFrom(model)
    graph = emulated.graph
    for field in ("node", "initializer", "value_info"):
        graph.ClearField(field)
    graph.initializer.extend(map(_float_weight, model.graph.initializer))
    for node in model.graph.node:
        graph.node.extend(_rounding(node, types))
    return emulated


def _rounding(node: NodeProto, types: dict[str, int]) -> list[NodeProto]:
    """Return what computes a node's outputs in float32, rounded to their types."""
    source = node.input[0] if node.input else ""
    low = [name for name in node.output if types.get(name) in LOW]
    if node.op_type == "Cast":
        if low:
            return _round(source, node.output[0], types[node.output[0]])
        if types.get(source) in LOW:
            return [helper.make_node("Identity", node.input, node.output, name=node.name)]
    if not low or node.op_type in MOVING:
        return [node]
    exact = NodeProto()
    exact.CopyFrom(node)
    nodes = [exact]
    for i, name in enumerate(node.output):
        if name in low:
            exact.output[i] = f"{name}.exact"
            nodes += _round(exact.output[i], name, types[name])
    return nodes


def _round(source: str, target: str, kind: int) -> list[NodeProto]:
    low = f"{target}.low"
    return [
        helper.make_node("Cast", [source], [low], name=low, to=kind),
        helper.make_node("Cast", [low], [target], name=f"{target}.rounded", to=TensorProto.FLOAT),
    ]


def _float_weight(tensor: TensorProto) -> TensorProto:
    if tensor.data_type not in LOW:
        return tensor
    values = numpy_helper.to_array(tensor).astype(np.float32)
    return numpy_helper.from_array(values, tensor.name)


def _types(model: ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values = [*inferred.input, *inferred.value_info, *inferred.output]
    return {value.name: value.type.tensor_type.elem_type for value in values}
