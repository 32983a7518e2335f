"""Write the precision into a graph: float16 or bfloat16, with islands of float32.

TensorRT from 11 on computes in the types that a graph has and in no others. Weights are stored in
the low type, inputs and outputs stay float32, and nodes that lose too much in the low type are
islands: their inputs are cast up, their outputs down. A value that several nodes read is cast once.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from coat_deploy.census import Asked, Census, EngineLayer
from coat_deploy.errors import GraphError, UsageError, unknown_name
from coat_deploy.graph.read import read_graph

LOW_PRECISIONS = ("fp16", "bf16")
"""What a graph can be lowered to."""

LAST = "last"

ISLANDS = ("LayerNormalization", "Softmax", LAST)
"""What stays float32. The two operators sum over many numbers and divide by what comes of it. The
last layer, of which an output is made, is the head: it costs next to nothing, and a logit of fp16
lies in steps of 0.002 to 0.004, further apart than the two best classes of some photographs."""

COMPUTING = ("Conv", "Gelu", "Gemm", "LayerNormalization", "MatMul", "Softmax")
"""Operators that no runtime does without; reshapes and the like it may leave out."""

MIN_OPSETS = {"fp16": 18, "bf16": 22}
"""Conv takes bfloat16 from 22 on."""

_ONNX = {
    "fp32": TensorProto.FLOAT,
    "fp16": TensorProto.FLOAT16,
    "bf16": TensorProto.BFLOAT16,
}
_NAMES = {kind: name for name, kind in _ONNX.items()}
_NUMPY = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}
_LARGEST = {"fp16": 65504.0, "bf16": 3.3895314e38}

_NUMBERS_ONLY = {"Resize": (1, 2)}
"""Inputs that an operator takes in float32 whatever it computes in: Resize's region and scales."""


@dataclass(frozen=True)
class Lowering:
    """What to compute in which type.

    islands: operators that stay float32, and `LAST` for those of `COMPUTING` whose result is an
    output. keep: scopes ("serial_blocks1.0", "head") all of whose nodes stay so.
    """

    precision: str
    islands: tuple[str, ...] = ISLANDS
    keep: tuple[str, ...] = ()

    def to_json(self) -> dict[str, list[str]]:
        """Return what was asked for besides the defaults."""
        given = {"keep_fp32": list(self.keep)} if self.keep else {}
        return given if self.islands == ISLANDS else given | {"islands": list(self.islands)}

    def asked(self, node: NodeProto, outputs: Collection[str]) -> str:
        """Return the precision that a node of a graph with such outputs shall compute in."""
        name = f"{node.name}."
        stays = (
            node.op_type in self.islands
            or any(name.startswith(f"{kept}.") for kept in self.keep)
            or (LAST in self.islands and node.op_type in COMPUTING and node.output[0] in outputs)
        )
        return "fp32" if stays else self.precision


def lower(model: ModelProto, lowering: Lowering) -> ModelProto:
    """Return a float32 graph in another precision; `model` stays as it is.

    The same graph gives the same bytes. No shapes or types of inner values are kept: a runtime
    infers them, and stale ones would mislead it.
    Raises: GraphError for an opset that is too old, a weight that the low type cannot hold, a
    node with a graph of its own; UsageError for a path to keep that leads nowhere.
    """
    opset, least = _opset(model), MIN_OPSETS[lowering.precision]
    if opset < least:
        raise GraphError(
            f"opset {opset}: too old for {lowering.precision} (expected {least} or newer). "
            "Export with --opset."
        )
    for path in lowering.keep:
        if not any(f"{node.name}.".startswith(f"{path}.") for node in model.graph.node):
            raise UsageError(unknown_name("module to keep in fp32", path, modules(model)))
    return _Lowerer(model, lowering).result()


class _Lowerer:
    """One pass over the nodes, in order; every float value is known by the types it exists in."""

    def __init__(self, model: ModelProto, lowering: Lowering) -> None:
        self.model, self.lowering = model, lowering
        self.weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self.outputs = _outputs(model)
        self.floats = _float_values(model)
        self.types = {
            value.name: "fp32" for value in model.graph.input if value.name in self.floats
        }
        """The precision that each value so far is computed in."""
        self.casts: dict[tuple[str, str], str] = {}
        self.stored: dict[str, TensorProto] = {}
        self.nodes: list[NodeProto] = []

    def result(self) -> ModelProto:
        for node in self.model.graph.node:
            self.add(node)
        lowered = ModelProto()
        lowered.CopyFrom(self.model)
        graph = lowered.graph
        for field in ("node", "initializer", "value_info"):
            graph.ClearField(field)
        graph.node.extend(self.nodes)
        graph.initializer.extend(self.stored.values())
        return lowered

    def add(self, node: NodeProto) -> None:
        """Add a node in its type, after the casts of what it reads."""
        if any(attribute.HasField("g") for attribute in node.attribute):
            raise GraphError(f"{node.name}: {node.op_type} holds a graph, which is not lowered.")
        kind = self.lowering.asked(node, self.outputs)
        added = NodeProto()
        added.CopyFrom(node)
        fixed = _NUMBERS_ONLY.get(node.op_type, ())
        for i, name in enumerate(node.input):
            if name in self.weights:
                added.input[i] = self.weight(name, "fp32" if i in fixed else kind)
            elif name in self.floats:
                added.input[i] = self.cast(name, kind)
        ends = []
        for i, name in enumerate(node.output):
            if name not in self.floats:
                continue
            if name in self.outputs and kind != "fp32":
                added.output[i] = f"{name}.{kind}"
                ends.append((added.output[i], name))
            self.types[added.output[i]] = kind
            self.types[name] = "fp32" if name in self.outputs else kind
        self.nodes.append(added)
        for inner, name in ends:
            self.nodes.append(_cast(inner, name, "fp32"))
            self.casts[name, kind] = inner  # what reads it on is spared the way back

    def cast(self, name: str, kind: str) -> str:
        """Return the value in another type; cast at its first use."""
        if self.types[name] == kind:
            return name
        if (name, kind) not in self.casts:
            self.casts[name, kind] = f"{name}.to_{kind}"
            self.nodes.append(_cast(name, self.casts[name, kind], kind))
        return self.casts[name, kind]

    def weight(self, name: str, kind: str) -> str:
        """Return a constant in a type, stored as such; integers as they are."""
        tensor = self.weights[name]
        if tensor.data_type != TensorProto.FLOAT or kind == "fp32":
            self.stored[name] = tensor
            return name
        lowered = f"{name}.{kind}"
        if lowered not in self.stored:
            values = numpy_helper.to_array(tensor)
            with np.errstate(over="ignore"):
                low = values.astype(_NUMPY[kind])
            if not np.isfinite(low.astype(np.float32)).all():
                raise GraphError(
                    f"{name}: does not fit into {kind} (largest "
                    f"{np.abs(values).max():.4g}, expected at most "
                    f"{_LARGEST[kind]:.4g}). Keep its block in fp32."
                )
            self.stored[lowered] = helper.make_tensor(
                lowered, _ONNX[kind], tensor.dims, low.tobytes(), raw=True
            )
        return lowered


def asked_of(model: ModelProto, lowering: Lowering) -> Asked:
    """Return the precision that every node of a graph shall compute in.

    Nodes of integers and Casts are left out; needed are those of `COMPUTING`. What a graph does
    compute in: `computed_types`.
    """
    nodes, outputs = [node for node, _ in computed_types(model)], _outputs(model)
    needed = tuple(node.name for node in nodes if node.op_type in COMPUTING)
    return Asked({node.name: lowering.asked(node, outputs) for node in nodes}, needed)


def computed_types(model: ModelProto, integers: bool = False) -> Iterator[tuple[NodeProto, str]]:
    """Yield every node that computes with floats, and the precision it does so in.

    Read from the types of its outputs, as the checker infers them. Casts are left out.
    integers: yield products of 8-bit integers, too.
    """
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    values = [*inferred.graph.value_info, *inferred.graph.output]
    types = {value.name: value.type.tensor_type.elem_type for value in values}
    for node in model.graph.node:
        kind = _NAMES.get(types.get(node.output[0], 0))
        if integers and node.op_type == "MatMulInteger":
            kind = "int8"
        if node.op_type != "Cast" and kind:
            yield node, kind


def read_census(path: Path) -> Census:
    """Return what the nodes of a graph's file compute in; int8 for integer products.

    Raises: CorruptArtifact.
    """
    nodes = computed_types(read_graph(path, weights=False), integers=True)
    return Census(tuple(EngineLayer(n.name, n.op_type, n.name, kind) for n, kind in nodes))


def modules(model: ModelProto) -> tuple[str, ...]:
    """Return the paths of blocks, and of other modules of their size, in the graph's order."""
    return tuple(dict.fromkeys(_module(str(node.name)) for node in model.graph.node))


def _module(name: str) -> str:
    first, *rest = name.split(".")
    return f"{first}.{rest[0]}" if rest and rest[0].isdigit() else first


def _cast(source: str, target: str, kind: str) -> NodeProto:
    return helper.make_node("Cast", [source], [target], name=f"{source}.to_{kind}", to=_ONNX[kind])


def _float_values(model: ModelProto) -> frozenset[str]:
    """Return the names of all float32 values but constants."""
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True).graph
    values: Sequence[onnx.ValueInfoProto] = [
        *inferred.input, *inferred.value_info, *inferred.output,
    ]  # fmt: skip
    return frozenset(
        value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT
    )


def _outputs(model: ModelProto) -> frozenset[str]:
    return frozenset(value.name for value in model.graph.output)


def _opset(model: ModelProto) -> int:
    return next(
        int(entry.version) for entry in model.opset_import if entry.domain in ("", "ai.onnx")
    )
