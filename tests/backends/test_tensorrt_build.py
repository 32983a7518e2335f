"""Engines built by NVIDIA's own parser and builder, TensorRT for RTX, which needs no GPU."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

pytest.importorskip("tensorrt_rtx")

from coat_deploy.backends import cuda, tensorrt, tensorrt_rtx  # noqa: E402
from coat_deploy.engine import BuildOptions, Profile  # noqa: E402
from coat_deploy.errors import CorruptArtifact, GraphError, RunnerError, UsageError  # noqa: E402
from coat_deploy.graph.coat import GraphOptions, author_graph  # noqa: E402
from coat_deploy.graph.form import get_form  # noqa: E402
from coat_deploy.graph.precision import Lowering, asked_of, lower  # noqa: E402
from coat_deploy.network.variants import VARIANTS  # noqa: E402
from coat_deploy.network.weights import load_checkpoint  # noqa: E402
from coat_deploy.spec import ModelSpec, Preprocess  # noqa: E402

PRECISIONS = ("fp32", "fp16", "bf16")
REAL = [name for name in VARIANTS if not name.endswith(("toy", "nano"))]
ANY = Profile.of((1, 2, 4), (64, 64))
TWO = Profile.of((2, 2, 2), (64, 64))
"""Built in half the time; for what does not depend on the batch."""


def author(name="coat_toy", precision="fp16", size=(64, 64), keep=(), trace=None):
    """Return the graph of a variant for engines, and what is asked of it."""
    variant = VARIANTS[name]
    nominal = size or (64, 64)
    spec = ModelSpec(name, 10, variant.num_features, Preprocess(nominal))
    weights = load_checkpoint("random:0", spec).tensors
    form, options = get_form("tensorrt-rtx", precision), GraphOptions(size, opset=22)
    graph = trace(spec, weights, options) if trace else author_graph(spec, weights, form, options)
    lowering = Lowering(form.types, keep=keep)
    return lower(graph, lowering) if form.types != "fp32" else graph, lowering


def write(graph, folder):
    path = folder / "toy.onnx"
    path.write_bytes(graph.SerializeToString())
    return path


def build(graph, lowering, folder, profiles=(TWO,), tell=lambda step: None, **options):
    how = BuildOptions(profiles, **options)
    return tensorrt_rtx.build(write(graph, folder), how, asked_of(graph, lowering), tell)


def shares(built) -> dict[str, int]:
    return {kind: v["layers"] for kind, v in built.census.to_json()["by_precision"].items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy"])
@pytest.mark.parametrize("batch", [(1, 2, 4), (3, 3, 3)], ids=["open batch", "static"])
def test_toys_are_built_as_asked(name, precision, batch, tmp_path) -> None:
    built = build(*author(name, precision), tmp_path, [Profile.of(batch, (64, 64))])
    assert len(built.plan) > 10_000
    assert (built.gpu, built.compute_capability) == (None, None)
    found = shares(built)
    assert set(found) == {precision, "fp32"}
    if precision != "fp32":
        assert found[precision] > 5 * found["fp32"]
        islands = [layer for layer in built.census.layers if layer.precision == "fp32"]
        last = {layer.kind for layer in islands if layer.node == "logits"}
        assert last == {"MATRIX_MULTIPLY", "ELEMENTWISE"}
        assert {layer.kind for layer in islands} == last | {"NORMALIZATION", "SOFTMAX"}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_toy_of_open_size_is_built(precision, tmp_path) -> None:
    profile = Profile((1, 2, 4), (32, 64, 96), (32, 64, 96))
    built = build(*author("coat_toy", precision, None), tmp_path, [profile])
    assert set(shares(built)) == {precision, "fp32"}


def test_an_engine_is_built_for_several_ranges(tmp_path) -> None:
    graph = author("coat_lite_toy", "fp16", None)
    small = Profile((1, 1, 1), (32, 32, 64), (32, 32, 64))
    one, both = (len(build(*graph, tmp_path, some).plan) for some in ([ANY], [ANY, small]))
    assert both > one + 10_000


def test_pytorchs_own_export_is_built_typed(tmp_path, trace) -> None:
    built = build(*author("coat_lite_toy", "fp16", trace=trace), tmp_path, [ANY])
    assert shares(built)["fp16"] > shares(built)["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", REAL)
def test_every_variant_is_built_as_asked(name, precision, tmp_path) -> None:
    size = (VARIANTS[name].input_size,) * 2
    built = build(*author(name, precision, size), tmp_path, [Profile.of((1, 8, 64), size)])
    found = shares(built)
    assert set(found) == {precision, "fp32"}
    assert precision == "fp32" or found[precision] > 5 * found["fp32"]


def test_the_same_graph_gives_the_same_engine(tmp_path) -> None:
    first, second = (build(*author("coat_lite_toy"), tmp_path).plan for _ in range(2))
    assert first == second


def test_a_block_that_is_kept_computes_in_float32(tmp_path) -> None:
    built = build(*author("coat_lite_toy", keep=("serial_blocks3.0",)), tmp_path)
    stages = built.census.to_json()["by_stage"]
    assert set(stages["serial_blocks3"]) == {"fp32"}
    assert stages["serial_blocks2"]["fp16"] > stages["serial_blocks2"]["fp32"]


def test_a_graph_of_a_wrong_type_fails_with_the_layers_name(tmp_path) -> None:
    """One linear layer left in float32, between casts: all that a silent fallback leaves behind."""
    graph, _ = author(keep=("serial_blocks2.0.mlp.fc1",))
    with pytest.raises(GraphError) as caught:
        build(graph, Lowering("fp16"), tmp_path)
    message = str(caught.value)
    assert "serial_blocks2.0.mlp.fc1 (matrix_multiply) in fp32, not fp16" in message
    assert "layers do not compute as asked" in message


def test_a_float32_graph_is_no_float16_engine(tmp_path) -> None:
    with pytest.raises(GraphError, match="layers do not compute as asked"):
        build(author(precision="fp32")[0], Lowering("fp16"), tmp_path)


def test_types_that_do_not_meet_are_refused_with_the_node(tmp_path) -> None:
    """TensorRT casts nothing by itself in a strongly typed network."""
    graph, lowering = author()
    asked = asked_of(graph, lowering)
    cast = next(n for n in graph.graph.node if n.op_type == "Cast" and "norm1" in n.output[0])
    for node in graph.graph.node:
        node.input[:] = [cast.input[0] if name == cast.output[0] else name for name in node.input]
    with pytest.raises(GraphError, match=r"toy\.onnx: TensorRT for RTX .* does not take it at "):
        tensorrt_rtx.build(write(graph, tmp_path), BuildOptions((ANY,)), asked, print)


def test_an_operator_that_it_does_not_have_is_named(tmp_path) -> None:
    graph, lowering = author()
    asked = asked_of(graph, lowering)
    graph.graph.node[20].op_type, graph.graph.node[20].domain = "Fancy", "nobody"
    graph.opset_import.append(helper.make_opsetid("nobody", 1))
    name = graph.graph.node[20].name
    with pytest.raises(GraphError, match=rf"does not take it at {name} \(Fancy\): "):
        tensorrt_rtx.build(write(graph, tmp_path), BuildOptions((ANY,)), asked, print)


@pytest.mark.parametrize("content", [b"", b"hello " * 99, None], ids=["empty", "garbage", "absent"])
def test_a_file_that_is_no_graph_is_corrupt(content, tmp_path) -> None:
    asked, path = asked_of(*author()), tmp_path / "toy.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((CorruptArtifact, GraphError), match=r"toy\.onnx") as caught:
        tensorrt_rtx.build(path, BuildOptions((ANY,)), asked, print)
    assert "\n" not in str(caught.value)


def test_a_profile_outside_the_graph_is_refused_in_one_line(tmp_path) -> None:
    with pytest.raises(
        RunnerError, match=r"toy\.onnx: TensorRT for RTX .* does not build it \("
    ) as e:
        build(*author("coat_lite_toy"), tmp_path, [Profile.of((1, 2, 4), (96, 96))])
    assert "\n" not in str(e.value)


def test_options_reach_the_builder(tmp_path) -> None:
    plain = build(*author("coat_lite_toy", "fp32"), tmp_path).plan
    tuned = build(
        *author("coat_lite_toy", "fp32"),
        tmp_path,
        tf32=True,
        effort=1,
        workspace_mib=64,
        compute_capabilities=("8.9",),
    ).plan
    assert plain != tuned


def test_a_gpu_that_it_does_not_know_is_refused(tmp_path) -> None:
    with pytest.raises(UsageError, match=r"does not build for 3\.5 \(known: .*8\.9"):
        build(*author(), tmp_path, compute_capabilities=("3.5",))


def test_the_builder_tells_how_far_it_is(tmp_path) -> None:
    told: list[str] = []
    build(*author("coat_lite_toy"), tmp_path, tell=told.append)
    assert told[0] == "parsing the graph"
    assert any(step.startswith("building: ") and " of " in step for step in told)


def test_an_interrupt_ends_the_build(tmp_path) -> None:
    steps = iter(range(100))

    def interrupt(step: str) -> None:
        if next(steps) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(*author("coat_lite_toy"), tmp_path, tell=interrupt)
    assert next(steps) < 10


@pytest.mark.skipif(cuda.problem() is None, reason="there is a GPU")
def test_tensorrt_itself_wants_a_gpu_to_build(tmp_path) -> None:
    graph, lowering = author()
    with pytest.raises(RunnerError, match=r"tensorrt: TensorRT builds for the GPU at hand, and "):
        tensorrt.build(
            write(graph, tmp_path), BuildOptions((ANY,)), asked_of(graph, lowering), print
        )


@pytest.mark.skipif(cuda.problem() is None, reason="there is a GPU")
def test_an_engine_is_not_loaded_without_a_gpu(tmp_path) -> None:
    from coat_deploy.runner import LoadOptions

    path = tmp_path / "toy.engine"
    path.write_bytes(build(*author("coat_lite_toy"), tmp_path).plan)
    with pytest.raises(RunnerError, match=r"toy\.engine: TensorRT for RTX needs an NVIDIA GPU"):
        tensorrt_rtx.load(path, LoadOptions())


def test_a_resize_of_constant_size_is_why_sizes_are_computed(tmp_path) -> None:
    """Should this fail one day, `resize_sizes` has done its time."""
    pixels = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ("batch", 3, 8, 8))
    logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, ("batch", 3, 16, 16))
    size = onnx.numpy_helper.from_array(np.array([16, 16]), "size")
    node = helper.make_node(
        "Resize", ["pixels", "", "", "size"], ["logits"], "resize", axes=[2, 3], mode="linear"
    )
    graph = helper.make_graph([node], "resize", [pixels], [logits], [size])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    with pytest.raises(GraphError, match="inherently negative length"):
        build(model, Lowering("fp32"), tmp_path, [Profile.of((1, 2, 4), (8, 8))])
