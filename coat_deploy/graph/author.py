"""A thin, typed builder of ONNX graphs: one method an operator, names by module path.

A tensor is its name. A node's name is the path of the module it computes, so that a node in a
viewer, a profile or an error leads to its line of the network.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NewType

import numpy as np
import numpy.typing as npt
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from coat_deploy.errors import GraphError
from coat_deploy.graph.layer import Floats, Layer
from coat_deploy.graph.quantize import quantize_rows

Value = NewType("Value", str)
"""Name of a tensor of the graph."""

MIN_OPSET, MAX_OPSET, DEFAULT_OPSET = 18, 23, 20
"""Resize by axes needs 18; Gelu is one operator from 20 on."""


def check_opset(opset: int) -> None:
    """Raise GraphError unless graphs of `opset` are made here."""
    if not MIN_OPSET <= opset <= MAX_OPSET:
        raise GraphError(
            f"opset {opset}: not supported (expected {MIN_OPSET} to {MAX_OPSET}). "
            f"Choose {DEFAULT_OPSET} unless the runtime is older."
        )


class Author:
    """Collects nodes and initializers; `finish` prunes what no output needs.

    Every constant is stored once: the same name must always come with the same values.
    """

    def __init__(self, opset: int = DEFAULT_OPSET) -> None:
        check_opset(opset)
        self.opset = opset
        self._nodes: list[NodeProto] = []
        self._initializers: dict[str, TensorProto] = {}
        self._taken: set[str] = set()
        self._quantized: dict[Value, list[Value]] = {}
        self._scope: tuple[str, ...] = ()

    @contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Prefix the names of all nodes authored inside with `name` and a dot."""
        self._scope = (*self._scope, name)
        try:
            yield
        finally:
            self._scope = self._scope[:-1]

    def path(self, name: str) -> str:
        """Return `name` with the scopes it stands in, as nodes and constants are called."""
        return ".".join((*self._scope, name))

    def constant(self, name: str, array: npt.NDArray[Any]) -> Value:
        """Store an initializer under its absolute `name`: float32, int8, or else int64."""
        dtype: npt.DTypeLike = np.int8 if array.dtype == np.int8 else np.int64
        if np.issubdtype(array.dtype, np.floating):
            dtype = np.float32
        tensor = numpy_helper.from_array(np.ascontiguousarray(array, dtype=dtype), name)
        known = self._initializers.setdefault(name, tensor)
        assert known is tensor or known == tensor, f"two different constants named {name}"
        return Value(name)

    def integers(self, *values: int) -> Value:
        """Store a small integer vector, named by what it holds."""
        return self.constant("int64_" + "_".join(map(str, values)), np.array(values))

    def shape(self, *parts: int | Value, name: str) -> Value:
        """Return the integer vector of `parts`, a constant unless some are known only later.

        A part that is a value is a vector itself.
        """
        if all(isinstance(part, int) for part in parts):
            return self.integers(*(int(part) for part in parts))
        vectors = [self.integers(part) if isinstance(part, int) else part for part in parts]
        return self.concat(vectors, 0, name)

    def node(
        self, op_type: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any
    ) -> list[Value]:
        """Add a node called by the scope and `name`; its outputs bear the same name."""
        path = self._unique(self.path(name))
        names = [path] if outputs == 1 else [f"{path}.{i}" for i in range(outputs)]
        self._nodes.append(helper.make_node(op_type, inputs, names, name=path, **attributes))
        return [Value(output) for output in names]

    def _unique(self, path: str) -> str:
        candidate, count = path, 1
        while candidate in self._taken:
            count += 1
            candidate = f"{path}_{count}"
        self._taken.add(candidate)
        return candidate

    def linear(self, x: Value, layer: Layer, name: str, key: str | None = None) -> Value:
        """Return `x W^T + b` of rows (R, C_in).

        `key` names the constants where several nodes share them.
        """
        key = key or self.path(name)
        if layer.int8:
            return self._linear_int8(x, layer, name, key)
        if layer.bias is None:
            matrix = self.constant(f"{key}.weight", layer.weight.T)
            return self.node("MatMul", (x, matrix), name)[0]
        # The weight as PyTorch keeps it: OpenVINO keeps one that it transposes twice.
        weight = self.constant(f"{key}.weight", layer.weight)
        bias = self.constant(f"{key}.bias", layer.bias)
        return self.node("Gemm", (x, weight, bias), name, transB=1)[0]

    def _linear_int8(self, x: Value, layer: Layer, name: str, key: str) -> Value:
        """Return `s_x s_W (x_q - z) W_q^T + b`, in the standard operators that runtimes fuse.

        `x` is quantized to 8 bits by its own range, over all images of a request; once, whatever
        the number of layers that read it.
        """
        if x not in self._quantized:
            self._quantized[x] = self.node("DynamicQuantizeLinear", (x,), f"{name}_quantize", 3)
        values, scale, zero = self._quantized[x]
        weight, scales = quantize_rows(layer.weight)
        matrix = self.constant(f"{key}.weight_int8", weight.T)
        of_rows = self.constant(f"{key}.weight_scale", scales)
        with self.scope(name):
            total = self.node("MatMulInteger", (values, matrix, zero), "int32")[0]
            total = self.node("Cast", (total,), "float", to=TensorProto.FLOAT)[0]
            factor = self.mul(scale, of_rows, "scale")
            if layer.bias is not None:
                total = self.mul(total, factor, "scaled")
        if layer.bias is None:
            return self.mul(total, factor, name)
        return self.add(total, self.constant(f"{key}.bias", layer.bias), name=name)

    def depthwise(self, x: Value, weight: Floats, bias: Floats, name: str, key: str) -> Value:
        """Return a depthwise convolution of maps (B, C, H, W), same size; `weight` (C, 1, k, k)."""
        window = weight.shape[-1]
        inputs = (x, self.constant(f"{key}.weight", weight), self.constant(f"{key}.bias", bias))
        return self.node(
            "Conv",
            inputs,
            name,
            group=weight.shape[0],
            kernel_shape=[window, window],
            pads=[window // 2] * 4,
        )[0]

    def patches(self, x: Value, weight: Floats, bias: Floats, name: str) -> Value:
        """Return a convolution whose stride is its kernel, of maps (B, C, H, W)."""
        key = self.path(name)
        inputs = (x, self.constant(f"{key}.weight", weight), self.constant(f"{key}.bias", bias))
        sides = list(weight.shape[2:])
        return self.node("Conv", inputs, name, kernel_shape=sides, strides=sides)[0]

    def layer_norm(
        self,
        x: Value,
        gamma: Floats,
        beta: Floats | None,
        eps: float,
        name: str,
        key: str | None = None,
    ) -> Value:
        """Return the LayerNorm of `x` over its last axis; `key` names its constants."""
        key = key or self.path(name)
        inputs = [x, self.constant(f"{key}.weight", gamma)]
        if beta is not None:
            inputs.append(self.constant(f"{key}.bias", beta))
        return self.node("LayerNormalization", inputs, name, axis=-1, epsilon=eps)[0]

    def gelu(self, x: Value, name: str) -> Value:
        """Return the exact GELU; below opset 20 in the operators that runtimes fuse to one."""
        if self.opset >= 20:
            return self.node("Gelu", (x,), name)[0]
        with self.scope(name):
            root2 = self.constant("gelu.root2", np.array(2**0.5))
            one, half = (self.constant(f"gelu.{v}", np.array(v)) for v in (1.0, 0.5))
            erf = self.node("Erf", self.node("Div", (x, root2), "div"), "erf")
            gate = self.node("Mul", (x, self.node("Add", (erf[0], one), "add")[0]), "gate")
            return self.node("Mul", (gate[0], half), "half")[0]

    def add(self, *values: Value, name: str) -> Value:
        """Return the sum of two or more values of one shape.

        Pair by pair: onnxruntime's Sum of four is a little slower than three of its Adds.
        """
        total = values[0]
        for i, value in enumerate(values[1:], start=2):
            last = i == len(values)
            total = self.node("Add", (total, value), name if last else f"{name}_{i}")[0]
        return total

    def mul(self, x: Value, y: Value, name: str) -> Value:
        """Return the product of two values, broadcast."""
        return self.node("Mul", (x, y), name)[0]

    def matmul(self, x: Value, y: Value, name: str) -> Value:
        """Return the matrix product, batched over leading axes."""
        return self.node("MatMul", (x, y), name)[0]

    def softmax(self, x: Value, name: str, axis: int = -1) -> Value:
        """Return the softmax over an axis, the last one unless told."""
        return self.node("Softmax", (x,), name, axis=axis)[0]

    def concat(self, values: Sequence[Value], axis: int, name: str) -> Value:
        """Return the values one after another along `axis`."""
        return self.node("Concat", values, name, axis=axis)[0]

    def slice(self, x: Value, start: int, end: int, axis: int, name: str) -> Value:
        """Return the entries of `x` from `start` up to, and without, `end` along `axis`."""
        ends = (self.integers(number) for number in (start, end, axis))
        return self.node("Slice", (x, *ends), name)[0]

    def corner(self, x: Value, axes: Sequence[int], name: str) -> Value:
        """Return the first entry of `x` along each of `axes`, which stay with length 1."""
        starts = self.integers(*(0 for _ in axes))
        ends = self.integers(*(1 for _ in axes))
        return self.node("Slice", (x, starts, ends, self.integers(*axes)), name)[0]

    def transpose(self, x: Value, axes: Sequence[int], name: str) -> Value:
        """Return `x` with its axes in another order."""
        return self.node("Transpose", (x,), name, perm=list(axes))[0]

    def reshape(self, x: Value, shape: Value, name: str) -> Value:
        """Return `x` in another shape; -1 is inferred, 0 copies the axis."""
        return self.node("Reshape", (x, shape), name)[0]

    def resize(
        self, x: Value, size: Value, axes: Sequence[int], name: str, computed: bool = False
    ) -> Value:
        """Resample bilinearly (half-pixel centres) to `size` along two `axes`.

        `computed`: the size shall not reach the node as a constant.
        """
        if computed:
            size = self.node("Identity", (size,), f"{name}_size")[0]
        return self.node(
            "Resize",
            (x, "", "", size),
            name,
            axes=list(axes),
            mode="linear",
            coordinate_transformation_mode="half_pixel",
        )[0]

    def finish(
        self,
        name: str,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
    ) -> ModelProto:
        """Return the model of these float32 inputs and outputs, without dead nodes."""
        nodes = _live_nodes(self._nodes, set(outputs))
        used = {value for node in nodes for value in _inputs(node)}
        graph = helper.make_graph(
            nodes,
            name,
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
            [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
            [tensor for key, tensor in self._initializers.items() if key in used],
        )
        return _wrap(graph, self.opset)


def _live_nodes(nodes: Sequence[NodeProto], needed: set[str]) -> list[NodeProto]:
    """Return, in order, the nodes that some needed tensor depends on."""
    live = []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            needed.update(_inputs(node))
            live.append(node)
    return live[::-1]


def _inputs(node: NodeProto) -> set[str]:
    """Return what a node reads, in the body it may have too."""
    read = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            read |= _inputs(inner)
    return read


def _wrap(graph: GraphProto, opset: int) -> ModelProto:
    opsets = [helper.make_opsetid("", opset)]
    return helper.make_model(
        graph,
        opset_imports=opsets,
        # The oldest file format that holds this opset: older runtimes refuse a newer one.
        ir_version=helper.find_min_ir_version_for(opsets),
    )
