"""An emulation is held against what the types it emulates do to numbers, in numpy."""

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.emulation import emulate
from coat_deploy.graph.form import GraphForm
from coat_deploy.graph.precision import Lowering, lower
from coat_deploy.network.variants import VARIANTS
from coat_deploy.network.weights import load_checkpoint
from coat_deploy.spec import ModelSpec, Preprocess

DTYPES = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
RANDOM = np.random.default_rng(3)
WEIGHT = RANDOM.standard_normal((64, 16), np.float32)
X = RANDOM.standard_normal((5, 64), np.float32)


def run(model: onnx.ModelProto, name: str, x: np.ndarray) -> np.ndarray:
    settings = onnxruntime.SessionOptions()
    settings.log_severity_level = 4
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), settings, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {name: x})[0]


def linear(*others: onnx.NodeProto) -> onnx.ModelProto:
    """x -> x W -> whatever else -> y, in float32."""
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["product"], name="product"), *others],
        "linear",
        [info("x", TensorProto.FLOAT, ["n", 64])],
        [info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(WEIGHT, "w")],
    )
    opset = helper.make_opsetid("", 22)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


@pytest.mark.parametrize("precision", DTYPES)
def test_a_product_is_of_low_numbers_added_up_in_float32_and_rounded(precision) -> None:
    def low(values: np.ndarray) -> np.ndarray:
        return values.astype(DTYPES[precision]).astype(np.float32)

    scaled = helper.make_node("Mul", ["product", "product"], ["y"], name="square")
    product = low(low(X).astype(np.float64) @ low(WEIGHT).astype(np.float64))
    got = run(emulate(lower(linear(scaled), Lowering(precision))), "x", X)
    # Another order of summing moves a product across half a step now and then.
    assert (got == low(product * product)).mean() > 0.97
    assert got.dtype == np.float32


def test_islands_are_not_rounded() -> None:
    softmax = helper.make_node("Softmax", ["product"], ["y"], name="softmax", axis=-1)
    got = run(emulate(lower(linear(softmax), Lowering("fp16"))), "x", X)
    assert not np.array_equal(got, got.astype(np.float16).astype(np.float32))


def test_numbers_beyond_the_low_type_are_infinite_as_on_a_gpu() -> None:
    square = helper.make_node("Mul", ["product", "product"], ["y"], name="square")
    got = run(emulate(lower(linear(square), Lowering("fp16"))), "x", X * 1000)
    assert np.isinf(got).any()


def spec_of(name: str) -> ModelSpec:
    return ModelSpec(name, 10, VARIANTS[name].num_features, Preprocess((64, 64)))


@pytest.mark.parametrize("precision", DTYPES)
@pytest.mark.parametrize("size", [(64, 64), None])
def test_a_network_is_emulated_whole(precision, size) -> None:
    spec = spec_of("coat_toy")
    weights = load_checkpoint("random:0", spec).tensors
    form = GraphForm(fold_norm="bias", resize_layout="nchw")
    whole = author_graph(spec, weights, form, GraphOptions(size, opset=22))
    lowered = lower(whole, Lowering(precision))
    before = lowered.SerializeToString(deterministic=True)
    emulated = emulate(lowered)
    assert lowered.SerializeToString(deterministic=True) == before
    low = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
    assert not any(tensor.data_type in low for tensor in emulated.graph.initializer)
    onnx.checker.check_model(emulated, full_check=True)
    x = np.random.default_rng(0).standard_normal((3, 3, 64, 64), np.float32)
    got, exact = run(emulated, "pixels", x), run(whole, "pixels", x)
    error = np.linalg.norm(got - exact) / np.linalg.norm(exact)
    expected = {"fp16": 1e-3, "bf16": 1e-2}[precision]
    assert expected / 20 < error < 3 * expected
