import math

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import ModelProto
from onnx.reference import ReferenceEvaluator

from coat_deploy.errors import GraphError
from coat_deploy.graph.author import DEFAULT_OPSET, MAX_OPSET, MIN_OPSET, Author, Value
from coat_deploy.graph.layer import Layer
from coat_deploy.graph.quantize import MOST

X = Value("x")
OPSETS = range(MIN_OPSET, MAX_OPSET + 1)


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    random = np.random.Generator(np.random.PCG64([seed, *shape]))
    return random.standard_normal(shape).astype(np.float32)


def finish(a: Author, shape: tuple[int, ...], output: str = "y", rank: int = 2) -> ModelProto:
    return a.finish("one", {"x": shape}, {output: tuple(f"d{i}" for i in range(rank))})


@pytest.fixture
def compute():
    """Return `compute(author, x, rank)`: the value of the node called y."""

    def run(a: Author, x: np.ndarray, rank: int) -> np.ndarray:
        model = finish(a, x.shape, rank=rank)
        onnx.checker.check_model(model, full_check=True)
        return ReferenceEvaluator(model).run(None, {"x": x})[0]

    return run


# Operators


def test_linear_equals_torch_linear(compute) -> None:
    a, x, weight, bias = Author(), draw(5, 6), draw(3, 6), draw(3)
    a.linear(X, Layer(weight, bias), "y")
    expected = torch.nn.functional.linear(*map(torch.from_numpy, (x, weight, bias))).numpy()
    assert np.abs(compute(a, x, 2) - expected).max() < 1e-5


def test_linear_without_bias_equals_torch_linear(compute) -> None:
    a, x, weight = Author(), draw(5, 6), draw(3, 6)
    a.linear(X, Layer(weight, None), "y")
    assert np.abs(compute(a, x, 2) - x @ weight.T).max() < 1e-5


@pytest.mark.parametrize("window", [1, 3, 7])
def test_depthwise_keeps_the_size_and_equals_torch(compute, window: int) -> None:
    a, x, weight, bias = Author(), draw(2, 4, 5, 6), draw(4, 1, window, window), draw(4)
    a.depthwise(X, weight, bias, "y", "key")
    tensors = map(torch.from_numpy, (x, weight, bias))
    expected = torch.nn.functional.conv2d(*tensors, padding=window // 2, groups=4).numpy()
    assert np.abs(compute(a, x, 4) - expected).max() < 1e-5


def test_patches_drop_pixels_that_fill_none_as_torch_does(compute) -> None:
    a, x, weight, bias = Author(), draw(2, 3, 9, 11), draw(5, 3, 4, 4), draw(5)
    a.patches(X, weight, bias, "y")
    expected = torch.nn.functional.conv2d(*map(torch.from_numpy, (x, weight, bias)), stride=4)
    assert expected.shape[2:] == (2, 2)
    assert np.abs(compute(a, x, 4) - expected.numpy()).max() < 1e-5


@pytest.mark.parametrize("eps", [1e-6, 1e-2])
def test_layer_norm_equals_torch(compute, eps: float) -> None:
    a, x, gamma, beta = Author(), draw(4, 6), draw(6), draw(6, seed=1)
    a.layer_norm(X, gamma, beta, eps, "y")
    tensors = map(torch.from_numpy, (gamma, beta))
    expected = torch.nn.functional.layer_norm(torch.from_numpy(x), (6,), *tensors, eps).numpy()
    assert np.abs(compute(a, x, 2) - expected).max() < 1e-5


@pytest.mark.parametrize("opset", OPSETS)
def test_gelu_is_the_exact_one_in_every_opset(compute, opset: int) -> None:
    a, x = Author(opset), np.linspace(-6, 6, 97, dtype=np.float32)[None]
    a.node("Identity", (a.gelu(X, "act"),), "y")
    expected = [v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x[0].tolist()]
    # The approximation by tanh is 5e-4 off.
    assert np.abs(compute(a, x, 2)[0] - expected).max() < 1e-6


def test_add_sums_two_or_more(compute) -> None:
    a, x = Author(), draw(2, 3)
    one = a.constant("one", np.ones((2, 3)))
    a.add(a.add(X, one, name="two"), one, X, name="y")
    assert np.abs(compute(a, x, 2) - (2 * x + 2)).max() < 1e-6


def test_corner_takes_the_first_entry_of_its_axes(compute) -> None:
    a, x = Author(), draw(2, 5, 6, 3)
    a.corner(X, (1, 2), "y")
    assert np.array_equal(compute(a, x, 4), x[:, :1, :1])


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
@pytest.mark.parametrize("size", [(14, 10), (3, 2), (7, 5), (1, 1)])
def test_resize_equals_torch_interpolate(layout: str, size: tuple[int, int]) -> None:
    a, x = Author(), draw(2, 3, 7, 5)
    given = x if layout == "nchw" else x.transpose(0, 2, 3, 1)
    a.resize(X, a.integers(*size), (2, 3) if layout == "nchw" else (1, 2), "y")
    got = onnxruntime_run(finish(a, given.shape, rank=4), given)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(x), size, mode="bilinear", align_corners=False
    ).numpy()
    got = got if layout == "nchw" else got.transpose(0, 3, 1, 2)
    assert np.abs(got - expected).max() < 1e-5


def onnxruntime_run(model: ModelProto, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"x": np.ascontiguousarray(x)})[0]


def test_a_shape_of_numbers_is_a_constant(compute) -> None:
    a, x = Author(), draw(6, 4)
    a.reshape(X, a.shape(2, -1, name="shape"), "y")
    assert compute(a, x, 2).shape == (2, 12)
    assert [node.op_type for node in finish(a, x.shape).graph.node] == ["Reshape"]


def test_a_shape_with_a_value_is_put_together_at_run_time(compute) -> None:
    a, x = Author(), draw(6, 4)
    width = a.node("Shape", (X,), "width", start=1)[0]
    a.reshape(X, a.shape(-1, width, 2, name="shape"), "y")
    assert compute(a, x, 3).shape == (3, 4, 2)


# Names and constants


def test_a_node_is_called_by_the_scopes_it_stands_in() -> None:
    a = Author()
    with a.scope("serial_blocks1.0"):
        with a.scope("mlp"):
            inner = a.gelu(X, "act")
        outer = a.gelu(X, "act")
    assert (inner, outer, a.gelu(X, "act")) == (
        "serial_blocks1.0.mlp.act",
        "serial_blocks1.0.act",
        "act",
    )


def test_a_scope_ends_with_an_exception() -> None:
    a = Author()
    with pytest.raises(ValueError, match="inside"), a.scope("block"):
        raise ValueError("inside")
    assert a.path("y") == "y"


@pytest.mark.parametrize("bias", [None, draw(7)], ids=["without bias", "bias"])
def test_an_int8_linear_is_the_product_of_its_rounded_inputs(compute, bias) -> None:
    """Against the formulas of ONNX's DynamicQuantizeLinear, read in float64."""
    a, x, weight = Author(), draw(9, 16), draw(7, 16, seed=1)
    a.linear(X, Layer(weight, bias, int8=True), "y")
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    step = (high - low) / 255
    zero = np.clip(np.rint(-low / step), 0, 255)
    rounded = (np.clip(np.rint(x / step) + zero, 0, 255) - zero) * step
    steps = np.abs(weight).max(axis=1, keepdims=True).astype(np.float64) / MOST
    expected = rounded @ (np.rint(weight / steps) * steps).T + (0 if bias is None else bias)
    assert np.abs(compute(a, x, 2) - expected).max() < 1e-5


def test_int8_layers_of_one_input_quantize_it_once() -> None:
    a = Author()
    y = [a.linear(X, Layer(draw(4, 4, seed=s), None, int8=True), f"y{s}") for s in (1, 2)]
    a.add(*y, name="y")
    kinds = [node.op_type for node in finish(a, (2, 4)).graph.node]
    assert kinds.count("DynamicQuantizeLinear") == 1
    assert kinds.count("MatMulInteger") == 2


def test_int8_layers_become_one_operator_each_in_onnxruntime(tmp_path) -> None:
    a = Author()
    hidden = a.linear(X, Layer(draw(8, 4), draw(8), int8=True), "fc1")
    a.linear(a.gelu(hidden, "act"), Layer(draw(4, 8), draw(4), int8=True), "y")
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 4
    model = finish(a, (2, 4)).SerializeToString()
    onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    nodes = onnx.load(options.optimized_model_filepath).graph.node
    assert {node.op_type for node in nodes} <= {
        "DynamicQuantizeLinear", "DynamicQuantizeMatMul", "MatMulIntegerToFloat", "Gelu"
    }  # fmt: skip


def test_a_name_used_again_is_counted() -> None:
    a = Author()
    assert [a.gelu(X, "act") for _ in range(3)] == ["act", "act_2", "act_3"]


def test_a_constant_used_twice_is_stored_once() -> None:
    a, layer = Author(), Layer(draw(3, 3), None)
    a.linear(a.linear(X, layer, "first", key="shared"), layer, "y", key="shared")
    model = finish(a, (2, 3))
    assert [tensor.name for tensor in model.graph.initializer] == ["shared.weight"]


def test_one_name_for_two_different_constants_is_our_mistake() -> None:
    a = Author()
    a.constant("scale", np.ones(2))
    with pytest.raises(AssertionError, match="two different constants named scale"):
        a.constant("scale", np.zeros(2))


def test_constants_are_float32_or_int64() -> None:
    a = Author()
    weight = a.constant("weight", np.ones(2, np.float64))
    a.reshape(a.mul(X, weight, "scaled"), a.integers(2, -1), "y")
    types = {t.name: t.data_type for t in finish(a, (2, 2)).graph.initializer}
    assert types == {"weight": onnx.TensorProto.FLOAT, "int64_2_-1": onnx.TensorProto.INT64}


def test_what_no_output_needs_is_left_out() -> None:
    a = Author()
    hidden = a.linear(X, Layer(draw(3, 3), None), "dead")
    a.gelu(hidden, "dead_too")
    a.gelu(X, "y")
    graph = finish(a, (2, 3)).graph
    assert [node.name for node in graph.node] == ["y"]
    assert not graph.initializer


# Opsets


@pytest.mark.parametrize("opset", [0, 17, 24])
def test_an_opset_out_of_range_is_refused_with_the_range(opset: int) -> None:
    with pytest.raises(GraphError, match=rf"opset {opset}: .*expected 18 to 23.*Choose 20"):
        Author(opset)


def test_the_default_opset_is_20() -> None:
    assert Author().opset == DEFAULT_OPSET == 20


# From the table of releases in ONNX's versioning document.
@pytest.mark.parametrize(
    ("opset", "ir_version"), [(18, 8), (19, 9), (20, 9), (21, 10), (22, 10), (23, 11)]
)
def test_the_file_format_is_the_oldest_that_holds_the_opset(opset: int, ir_version: int) -> None:
    a = Author(opset)
    a.node("Identity", (X,), "y")
    model = finish(a, (2, 3))
    assert model.ir_version == ir_version
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", opset)]
