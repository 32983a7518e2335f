"""The authored graph is the network, in a runtime to rounding; in float64 see test_float64.py."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
from onnx import numpy_helper

from coat_deploy.errors import GraphError
from coat_deploy.graph.check import check_graph, shape_operators
from coat_deploy.graph.form import GraphForm, get_form
from coat_deploy.network.keys import expected_shapes
from coat_deploy.network.variants import VARIANTS
from coat_deploy.runner import FEATURES
from coat_deploy.spec import ModelSpec, Preprocess

TOYS = ["coat_toy", "coat_lite_toy"]
NANOS = ["coat_nano", "coat_lite_nano"]
REAL = [name for name in VARIANTS if name not in TOYS]
OPSETS = range(18, 24)
FORM_CHOICES = {
    "default": GraphForm(),
    "context-folded": GraphForm(fold_context_ratio=0),
    "context-unfolded": GraphForm(fold_context_ratio=math.inf),
}
SIZES = [(64, 64), (75, 50), (33, 47), (32, 32), (250, 190)]

ROUNDING = 1e-5
"""Largest difference to float64, relative to the largest value: float32 itself makes 2e-6."""


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest value expected."""
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    return float(np.abs(got - expected).max() / np.abs(expected).max())


# The files, in float32: what onnxruntime makes of them


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", TOYS)
def test_a_graph_of_fixed_size_takes_any_batch(make_case, pixels, open_session, name, size) -> None:
    case = make_case(name)
    run = open_session(case.graph(size))
    for batch in (1, 3, 8):
        x = pixels(batch, size)
        assert distance(run(x)["logits"], case.eager(x)["logits"]) < ROUNDING


@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
@pytest.mark.parametrize("name", TOYS)
def test_one_dynamic_graph_takes_any_size_and_batch(
    make_case, pixels, open_session, name, features
) -> None:
    case = make_case(name)
    run = open_session(case.graph(None, features=features))
    for batch, size in zip((3, 1, 8, 2, 1), SIZES, strict=True):
        x = pixels(batch, size)
        got, expected = run(x), case.eager(x, features)
        assert got.keys() == expected.keys()
        for output in expected:
            assert distance(got[output], expected[output]) < ROUNDING


@pytest.mark.parametrize("name", TOYS)
def test_feature_maps_of_a_fixed_size_are_the_networks(
    make_case, pixels, open_session, name
) -> None:
    case, x = make_case(name), pixels(3, (75, 50))
    got, expected = open_session(case.graph((75, 50), features=True))(x), case.eager(x, True)
    assert list(got) == list(FEATURES)
    assert max(distance(got[output], expected[output]) for output in FEATURES) < ROUNDING


# Resizing in nchw is for OpenVINO; onnxruntime does not take it, see GraphForm.
@pytest.mark.parametrize("form", FORM_CHOICES.values(), ids=FORM_CHOICES)
@pytest.mark.parametrize("name", TOYS)
def test_every_form_of_onnxruntime_runs(make_case, pixels, open_session, name, form) -> None:
    case, x = make_case(name), pixels(3, (75, 50))
    for size in ((75, 50), None):
        got = open_session(case.graph(size, form=form))(x)["logits"]
        assert distance(got, case.eager(x)["logits"]) < ROUNDING


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", TOYS)
def test_every_opset_runs_and_is_valid(make_case, pixels, open_session, name, opset) -> None:
    case, x = make_case(name), pixels(2, (33, 47))
    for size in ((33, 47), None):
        model = case.graph(size, opset=opset)
        check_graph(model)
        assert distance(open_session(model)(x)["logits"], case.eager(x)["logits"]) < ROUNDING


def test_no_classes_give_the_vector_the_head_reads(make_case, pixels, open_session) -> None:
    for name in TOYS:
        case, x = make_case(name, 0), pixels(3)
        got = open_session(case.graph())(x)["logits"]
        assert got.shape == (3, VARIANTS[name].num_features)
        assert distance(got, case.eager(x)["logits"]) < ROUNDING


def test_an_image_of_a_batch_does_not_see_the_others(make_case, pixels, open_session) -> None:
    run, x = open_session(make_case("coat_toy").graph()), pixels(4)
    singly = np.concatenate([run(image[None])["logits"] for image in x])
    assert distance(run(x)["logits"], singly) < ROUNDING


# The variants for use


@pytest.mark.parametrize("name", NANOS)
def test_a_nano_agrees_with_eager_at_any_size(make_case, pixels, open_session, name) -> None:
    run, case = open_session(make_case(name).graph(None)), make_case(name)
    for size in ((64, 64), (224, 160), (75, 50)):
        x = pixels(2, size)
        assert distance(run(x)["logits"], case.eager(x)["logits"]) < ROUNDING


@pytest.mark.parametrize(
    "name",
    [
        "coat_lite_tiny",
        "coat_tiny",
        pytest.param("coat_small", marks=pytest.mark.slow),
        pytest.param("coat_lite_medium", marks=pytest.mark.slow),
        pytest.param("coat_lite_medium_384", marks=pytest.mark.slow),
    ],
)
def test_a_published_variant_agrees_with_eager(make_case, pixels, open_session, name) -> None:
    import torch

    case, side = make_case(name, 1000), VARIANTS[name].input_size
    x = pixels(1, (side, side))
    with torch.inference_mode():  # float32: float64 takes its time at this size
        expected = case.network()(torch.from_numpy(x)).numpy()
    got = open_session(case.graph((side, side)))(x)["logits"]
    assert np.abs(expected).max() > 1
    assert np.abs(got - expected).max() < 1e-4
    assert distance(got, expected) < ROUNDING


AUTHOR_WITHOUT_TORCH = """
import importlib.abc, json, sys
HEAVY = {"torch", "onnxruntime", "openvino", "timm", "onnxscript", "huggingface_hub"}
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] in HEAVY:
            raise ImportError(f"{name} must not be needed")
sys.meta_path.insert(0, Blocked())

import numpy as np
from coat_deploy.graph.check import check_graph, shape_operators
from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.form import get_form
from coat_deploy.network.variants import VARIANTS
from coat_deploy.spec import ModelSpec, Preprocess

name = sys.argv[1]
weights = {key: np.zeros(shape, np.float32) for key, shape in json.load(sys.stdin).items()}
side = VARIANTS[name].input_size
spec = ModelSpec(name, 1000, 0, Preprocess((side, side)))
for target, precision, size in (
    ("onnxruntime", "fp32", (side, side)),
    ("onnxruntime", "int8", (side, side)),
    ("openvino", "fp32", None),
):
    graph = author_graph(spec, weights, get_form(target, precision), GraphOptions(size))
    check_graph(graph)
    print([n.op_type for n in graph.graph.node if n.name in shape_operators(graph)])
"""


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if "medium" in name else []) for name in REAL],
)
def test_a_variant_is_authored_without_torch_and_shape_arithmetic(name) -> None:
    shapes = expected_shapes(ModelSpec(name, 1000, 0, Preprocess((224, 224))))
    done = subprocess.run(
        [sys.executable, "-c", AUTHOR_WITHOUT_TORCH, name],
        input=json.dumps(shapes),
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    fixed, int8, dynamic = done.stdout.splitlines()
    assert fixed == int8 == "[]"
    assert dynamic == "['Shape', 'Shape', 'Shape', 'Shape']"


@pytest.mark.parametrize("name", ["coat_tiny", "coat_lite_small"])
def test_what_blocks_share_is_stored_once(make_case, name) -> None:
    case = make_case(name, 1000)
    parameters = sum(p.numel() for p in case.network().parameters())
    graph = case.graph((224, 224)).graph
    stored = sum(math.prod(tensor.dims) for tensor in graph.initializer)
    # Windows padded to 7x7, head masks, and for CoaT the folded classifier come on top; a copy
    # of coat_tiny's FFN a scale would add 40 %.
    assert parameters < stored < 1.08 * parameters


# Shapes


@pytest.mark.parametrize("features", [False, True], ids=["logits", "features"])
@pytest.mark.parametrize("name", TOYS)
def test_a_fixed_size_leaves_no_shape_arithmetic(make_case, name, features) -> None:
    model = make_case(name).graph((75, 50), features=features)
    assert shape_operators(model) == []
    assert "ReduceProd" not in {node.op_type for node in model.graph.node}


@pytest.mark.parametrize("name", TOYS)
def test_a_dynamic_size_asks_once_a_scale(make_case, name) -> None:
    model = make_case(name).graph(None)
    assert shape_operators(model) == [f"patch_embed{s}.size" for s in (1, 2, 3, 4)]


@pytest.mark.parametrize(("size", "sides"), [((64, 96), [64, 96]), (None, ["height", "width"])])
def test_inputs_and_outputs_say_their_shapes(make_case, size, sides) -> None:
    def shapes(values) -> dict[str, list[int | str]]:
        return {
            v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim]
            for v in values
        }

    graph = make_case("coat_toy").graph(size).graph
    assert shapes(graph.input) == {"pixels": ["batch", 3, *sides]}
    assert shapes(graph.output) == {"logits": ["batch", 10]}
    features = shapes(make_case("coat_toy").graph(size, features=True).graph.output)
    assert [shape[:2] for shape in features.values()] == [["batch", c] for c in (16, 24, 24, 24)]
    assert features["x2"][2:] == ([8, 12] if size else ["x2_height", "x2_width"])


# Values that are not finite


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", [(0, 0), (31, 40), (63, 63)])
@pytest.mark.parametrize("name", TOYS)
def test_a_pixel_that_is_not_finite_spoils_its_image_only(
    make_case, pixels, open_session, name, value, place
) -> None:
    case, x = make_case(name), pixels(3)
    run = open_session(case.graph())
    whole = run(x)["logits"]
    x[1, 2, *place] = value
    got, expected = run(x)["logits"], case.eager(x)["logits"]
    assert np.isnan(got[1]).all()
    assert np.isnan(expected[1]).all()
    assert np.array_equal(got[[0, 2]], whole[[0, 2]])


def test_a_pixel_that_fills_no_patch_spoils_nothing(make_case, pixels, open_session) -> None:
    case, x = make_case("coat_toy"), pixels(2, (75, 50))
    run = open_session(case.graph((75, 50)))
    whole = run(x)["logits"]
    x[:, :, 74] = math.nan  # 75 = 18 patches of 4, and 3 more
    assert np.array_equal(run(x)["logits"], whole)


# Names


@pytest.mark.parametrize("name", TOYS)
def test_node_names_are_unique_and_begin_with_a_module_of_the_network(make_case, name) -> None:
    case = make_case(name)
    modules = set(dict(case.network().named_modules()))
    for model in (case.graph(), case.graph(None), case.graph(opset=18)):
        names = [node.name for node in model.graph.node]
        assert len(set(names)) == len(names)
        assert set(names).isdisjoint({""})
        lost = {n for n in names if not modules & {n, n.rsplit(".", 1)[0], *prefixes(n)}}
        assert lost <= {"logits", "cls"}  # the head, folded with the aggregation


def prefixes(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:count]) for count in range(1, len(parts))}


def test_a_node_bears_the_name_of_the_module_it_computes(make_case) -> None:
    names = {node.name for node in make_case("coat_toy").graph().graph.node}
    assert {
        "patch_embed1.proj",
        "serial_blocks1.0.cpe.conv",
        "serial_blocks1.0.norm1",
        "serial_blocks1.0.factoratt_crpe.crpe.conv",
        "serial_blocks1.0.factoratt_crpe.proj",
        "serial_blocks1.0.mlp.fc1",
        "serial_blocks1.0.mlp.act",
        "serial_blocks1.0.mlp.fc2",
        "norm4",
    } <= names


def test_ends_of_blocks_have_names_of_their_own(make_case) -> None:
    tensors = {name for node in make_case("coat_toy").graph().graph.node for name in node.output}
    assert {f"patch_embed{s}.image" for s in (1, 2, 3, 4)} <= tensors
    assert {f"serial_blocks{s}.0.image" for s in (1, 2, 3, 4)} <= tensors
    assert {f"serial_blocks{s}.0.cls" for s in (2, 3, 4)} <= tensors
    assert {f"parallel_blocks.0.{kind}{s}" for kind in ("image", "cls") for s in (2, 3, 4)} <= (
        tensors
    )


def test_a_constant_bears_the_name_of_the_weight_it_holds(make_case) -> None:
    case = make_case("coat_lite_toy")
    stored = {t.name: numpy_helper.to_array(t) for t in case.graph().graph.initializer}
    for key in (
        "serial_blocks2.1.norm1.weight",
        "serial_blocks2.1.mlp.fc1.weight",
        "patch_embed3.proj.weight",
        "head.weight",
        "head.bias",
    ):
        assert np.array_equal(stored[key], case.weights[key])


@pytest.mark.parametrize(
    "how",
    [
        ("tensorrt", "fp16"),
        ("tensorrt-rtx", "bf16"),
        ("onnxruntime", "fp16"),
        ("openvino", "bf16"),
    ],
)
def test_a_window_of_a_low_type_is_stored_without_the_one_of_its_sum(make_case, how) -> None:
    case = make_case("coat_toy")
    graph = case.graph(form=get_form(*how)).graph
    stored = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    for scale in (1, 2, 3, 4):
        window = case.weights[f"cpe{scale}.proj.weight"]
        assert np.array_equal(stored[f"cpe{scale}.weight"], window)


# Refusals


@pytest.mark.parametrize("size", [(31, 64), (64, 31), (0, 0), (1, 1)])
def test_a_size_below_the_minimum_is_refused_with_the_minimum(make_case, size) -> None:
    with pytest.raises(GraphError) as caught:
        make_case("coat_toy").graph(size)
    assert f"{size[0]}x{size[1]}" in str(caught.value)
    assert "at least 32" in str(caught.value)


@pytest.mark.parametrize("opset", [17, 24])
def test_an_opset_that_is_not_supported_is_refused(make_case, opset) -> None:
    with pytest.raises(GraphError, match=f"opset {opset}: not supported"):
        make_case("coat_toy").graph(opset=opset)


def test_direct_co_scale_sends_to_the_traced_form(make_case) -> None:
    with pytest.raises(GraphError, match="coat_toy: direct .* --form traced"):
        make_case("coat_toy", co_scale="direct").graph()


def test_direct_co_scale_means_nothing_to_a_network_without_parallel_blocks(
    make_case, pixels, open_session
) -> None:
    case, x = make_case("coat_lite_toy", co_scale="direct"), pixels()
    got = open_session(case.graph())(x)["logits"]
    assert distance(got, case.eager(x)["logits"]) < ROUNDING
