import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from coat_deploy.errors import GraphError
from coat_deploy.graph.check import check_graph
from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.form import GraphForm
from coat_deploy.graph.precision import (
    ISLANDS,
    LAST,
    Lowering,
    asked_of,
    computed_types,
    lower,
)
from coat_deploy.network.variants import VARIANTS
from coat_deploy.network.weights import load_checkpoint
from coat_deploy.spec import ModelSpec, Preprocess

ALL_OPSETS = {"fp16": (18, 20, 22, 23), "bf16": (22, 23)}
CASES = [(precision, opset) for precision, opsets in ALL_OPSETS.items() for opset in opsets]


def spec_of(name: str) -> ModelSpec:
    return ModelSpec(name, 10, VARIANTS[name].num_features, Preprocess((64, 64)))


def graph(name="coat_toy", opset=22, size=(64, 64), features=False, form=None):
    spec = spec_of(name)
    weights = load_checkpoint("random:0", spec).tensors
    options = GraphOptions(size, features, opset)
    return author_graph(spec, weights, form or GraphForm(), options)


def run(model: onnx.ModelProto, pixels: np.ndarray) -> dict[str, np.ndarray]:
    runtime = pytest.importorskip("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, {"pixels": pixels}), strict=True))


def pixels(batch=3, size=(64, 64)) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((batch, 3, *size)).astype(np.float32)


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    a, b = (x.reshape(len(x), -1).astype(np.float64) for x in (a, b))
    a, b = (x - x.mean(axis=1, keepdims=True) for x in (a, b))
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


@pytest.mark.parametrize(("precision", "opset"), CASES)
@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy"])
def test_a_lowered_graph_is_valid_and_takes_and_gives_float32(name, precision, opset) -> None:
    lowered = lower(graph(name, opset), Lowering(precision))
    check_graph(lowered)
    for value in (*lowered.graph.input, *lowered.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    assert not lowered.graph.value_info


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_all_but_the_islands_compute_in_the_low_type(precision) -> None:
    lowered = lower(graph(), Lowering(precision))
    types = [
        (node.op_type, kind) for node, kind in computed_types(lowered) if node.output[0] != "logits"
    ]
    operators = set(ISLANDS) - {LAST}
    assert {op for op, kind in types if kind == "fp32"} == operators
    assert {op for op, kind in types if kind == precision} >= {"MatMul", "Gemm", "Conv", "Resize"}
    assert not operators & {op for op, kind in types if kind == precision}


@pytest.mark.parametrize("islands", [(), (LAST,)])
def test_the_head_is_an_island_by_name(islands) -> None:
    lowered = lower(graph(), Lowering("fp16", islands))
    kinds = {node.name: kind for node, kind in computed_types(lowered)}
    assert {name for name, kind in kinds.items() if kind == "fp32"} == (
        {"logits"} if islands else set()
    )
    weights = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    whole = TensorProto.FLOAT if islands else TensorProto.FLOAT16
    assert {kind for name, kind in weights.items() if name.startswith("head.")} == {whole}


def test_a_map_that_is_an_output_was_computed_in_the_low_type() -> None:
    lowered = lower(graph(features=True), Lowering("fp16", (LAST,)))
    assert {kind for _, kind in computed_types(lowered)} == {"fp16"}


def test_what_is_asked_of_nodes_is_what_they_compute_in() -> None:
    lowering = Lowering("fp16", keep=("serial_blocks2.0",))
    lowered = lower(graph(), lowering)
    asked = asked_of(graph(), lowering).precisions
    assert asked == asked_of(lowered, lowering).precisions == {
        node.name: kind for node, kind in computed_types(lowered)
    }  # fmt: skip
    assert set(asked.values()) == {"fp16", "fp32"}


def test_a_node_that_computes_otherwise_than_asked_is_seen() -> None:
    lowered = lower(graph(), Lowering("fp16"))
    tampered = lower(graph(), Lowering("fp16", keep=("serial_blocks2.0.mlp.fc1",)))
    asked = asked_of(lowered, Lowering("fp16")).precisions
    wrong = [node.name for node, kind in computed_types(tampered) if kind != asked[node.name]]
    assert wrong == ["serial_blocks2.0.mlp.fc1"]


def test_islands_may_be_others() -> None:
    types = list(computed_types(lower(graph(), Lowering("fp16", islands=("Gelu",)))))
    assert {node.op_type for node, kind in types if kind == "fp32"} == {"Gelu"}


def test_a_scope_that_is_kept_computes_in_float32_and_no_other() -> None:
    kept = ("serial_blocks2.0", "logits")
    lowered = lower(graph(), Lowering("fp16", islands=(), keep=kept))
    nodes = list(computed_types(lowered))
    assert any(node.name.startswith("serial_blocks2.0.mlp") for node, _ in nodes)
    for node, kind in nodes:
        inside = any(f"{node.name}.".startswith(f"{scope}.") for scope in kept)
        inside |= node.output[0] == "logits"
        assert (kind == "fp32") == inside, node.name


def test_a_graph_of_which_all_is_kept_is_the_graph() -> None:
    model = graph()
    scopes = {node.name.split(".")[0] for node in model.graph.node}
    lowered = lower(model, Lowering("fp16", keep=tuple(scopes)))
    assert [node for node in lowered.graph.node] == [node for node in model.graph.node]
    assert {t.data_type for t in lowered.graph.initializer} <= {
        TensorProto.FLOAT,
        TensorProto.INT64,
    }


def test_weights_are_stored_low_and_those_of_islands_in_float32() -> None:
    model = graph()
    lowered = lower(model, Lowering("fp16"))
    types = {tensor.name: tensor.data_type for tensor in lowered.graph.initializer}
    norms = {name for name in types if ".norm" in name or name.startswith("norm")}
    exact = norms | {"head.weight", "head.bias"}
    assert norms and {types[name] for name in exact} == {TensorProto.FLOAT}
    floats = {t for name, t in types.items() if name not in exact}
    assert floats == {TensorProto.FLOAT16, TensorProto.INT64}
    before, after = (sum(len(t.raw_data) for t in m.graph.initializer) for m in (model, lowered))
    assert after < 0.55 * before


def test_lowering_leaves_its_argument_alone_and_gives_the_same_bytes() -> None:
    model = graph()
    before = model.SerializeToString(deterministic=True)
    first, second = (
        lower(model, Lowering("bf16")).SerializeToString(deterministic=True) for _ in range(2)
    )
    assert first == second != before == model.SerializeToString(deterministic=True)


def test_a_value_is_cast_once_to_a_type() -> None:
    lowered = lower(graph(), Lowering("fp16"))
    casts = [
        (node.input[0], node.attribute[0].i)
        for node in lowered.graph.node
        if node.op_type == "Cast"
    ]
    assert len(casts) == len(set(casts))


@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy", "coat_nano", "coat_lite_nano"])
@pytest.mark.parametrize("size", [(64, 64), None])
def test_float16_agrees_with_float32(name, size) -> None:
    model = graph(name, size=size)
    lowered = lower(model, Lowering("fp16"))
    for side in [(64, 64)] if size else [(64, 64), (75, 50)]:
        for batch in (1, 3):
            x = pixels(batch, side)
            expected, got = run(model, x)["logits"], run(lowered, x)["logits"]
            assert got.dtype == np.float32
            assert cosines(expected, got).min() > 0.9999
            assert np.abs(expected - got).max() > 1e-5  # were it float32 in disguise


def test_feature_maps_are_lowered_too() -> None:
    model, x = graph(features=True), pixels(2)
    expected, got = run(model, x), run(lower(model, Lowering("fp16")), x)
    assert list(got) == list(expected) == ["x1", "x2", "x3", "x4"]
    assert min(cosines(expected[name], got[name]).min() for name in expected) > 0.9999


@pytest.mark.slow
def test_a_traced_graph_can_be_lowered(trace) -> None:
    spec = spec_of("coat_lite_toy")
    model = trace(spec, load_checkpoint("random:0", spec).tensors, GraphOptions((64, 64)))
    x = pixels(2)
    expected, got = run(model, x)["logits"], run(lower(model, Lowering("fp16")), x)["logits"]
    assert cosines(expected, got).min() > 0.9999


def test_an_opset_without_the_type_is_refused() -> None:
    with pytest.raises(GraphError, match=r"opset 20: too old for bf16 .expected 22 or newer"):
        lower(graph(opset=20), Lowering("bf16"))


def test_a_weight_beyond_the_type_is_named_with_its_size() -> None:
    model = graph()
    for tensor in model.graph.initializer:
        if tensor.name == "cpe1.bias":
            tensor.CopyFrom(numpy_helper.from_array(np.full(16, 7e4, np.float32), "cpe1.bias"))
    with pytest.raises(GraphError, match=r"cpe1\.bias: does not fit into fp16 .largest 7e\+04"):
        lower(model, Lowering("fp16"))
    lower(model, Lowering("bf16"))


def test_a_graph_within_a_node_is_refused() -> None:
    model = graph()
    branch = helper.make_graph([helper.make_node("Identity", ["pixels"], ["same"])], "b", [], [
        helper.make_tensor_value_info("same", TensorProto.FLOAT, None)
    ])  # fmt: skip
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(
        helper.make_node("If", ["yes"], ["x"], name="if", then_branch=branch, else_branch=branch)
    )
    with pytest.raises(GraphError, match="if: If holds a graph, which is not lowered"):
        lower(model, Lowering("fp16"))


def test_an_input_that_must_be_float32_stays_so() -> None:
    scales = numpy_helper.from_array(np.array([1, 1, 2, 2], np.float32), "scales")
    shape = ("batch", 3, 4, 4)
    node = helper.make_node("Resize", ["pixels", "", "scales"], ["logits"], name="resize")
    values = [
        helper.make_tensor_value_info("pixels", TensorProto.FLOAT, shape),
        helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("batch", 3, 8, 8)),
    ]
    inner = helper.make_graph([node], "resize", values[:1], values[1:], [scales])
    model = helper.make_model(inner, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    lowered = lower(model, Lowering("fp16"))
    onnx.checker.check_model(lowered, full_check=True)
    assert [tensor.data_type for tensor in lowered.graph.initializer] == [TensorProto.FLOAT]
