"""The algebra: the authored graph is the network in float64, to the last digits."""

import functools
import math

import numpy as np
import pytest
import torch
from onnx import ModelProto, TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from coat_deploy.graph import coat
from coat_deploy.graph.author import Author, Value
from coat_deploy.graph.form import GraphForm

TOYS = ["coat_toy", "coat_lite_toy"]
NANOS = ["coat_nano", "coat_lite_nano"]
OPSETS = range(18, 24)
FORM_CHOICES = {
    "default": GraphForm(),
    "context-folded": GraphForm(fold_context_ratio=0),
    "context-unfolded": GraphForm(fold_context_ratio=math.inf),
    "resize-nchw": GraphForm(resize_layout="nchw"),
    "norm-in-channel": GraphForm(fold_norm="channel"),
    "proj-folded": GraphForm(fold_norm="channel", fold_proj_ratio=0),
    "norm-in-bias": GraphForm(fold_norm="bias"),
    "shared-norms-kept": GraphForm(fold_norm="bias", fold_shared_to=0),
    "keys-as-rows": GraphForm(keys="rows"),
    "position-apart": GraphForm(fold_position=False),
    "ffn-joined": GraphForm(join_ffn_to=math.inf),
    "all-of-it": GraphForm(fold_norm="channel", fold_proj_ratio=4, join_ffn_to=0.5),
}
ABLATIONS = [{"cpe": False}, {"crpe": False}, {"co_scale": "none"}, {"cpe": False, "crpe": False}]


class Author64(Author):
    """Keeps constants in float64, so that folding cannot hide behind rounding."""

    def constant(self, name: str, array: np.ndarray) -> Value:
        if not np.issubdtype(array.dtype, np.floating):
            return super().constant(name, array)
        assert array.dtype == np.float64, f"{name} was rounded before it was stored"
        tensor = numpy_helper.from_array(np.ascontiguousarray(array), name)
        assert self._initializers.setdefault(name, tensor) == tensor
        return Value(name)

    def finish(self, *arguments) -> ModelProto:
        model = super().finish(*arguments)
        for value in (*model.graph.input, *model.graph.output):
            value.type.tensor_type.elem_type = TensorProto.DOUBLE
        return model


# Operators that ONNX's reference implementation rounds, or computes number by number.


def erf(x: np.ndarray) -> np.ndarray:
    return torch.special.erf(torch.from_numpy(np.ascontiguousarray(x))).numpy()


class Erf(OpRun):
    op_domain = ""

    def _run(self, x):
        return (erf(x),)


class Gelu(OpRun):
    op_domain = ""

    def _run(self, x, approximate=None):
        assert approximate in (None, "none")
        return (x / 2 * (1 + erf(x / math.sqrt(2))),)


@functools.cache
def interpolation(old: int, new: int) -> np.ndarray:
    """Return the matrix (new, old) that resamples a line at the centres of its new pixels."""
    centres = (np.arange(new) + 0.5) * old / new - 0.5
    return np.stack([np.interp(centres, range(old), pixel) for pixel in np.eye(old)], axis=1)


class Resize(OpRun):
    op_domain = ""

    def _run(self, x, _roi, _scales, sizes, axes, mode, coordinate_transformation_mode, **_others):
        assert (mode, coordinate_transformation_mode) == ("linear", "half_pixel")
        for axis, size in zip(axes, sizes, strict=True):
            matrix = interpolation(x.shape[axis], int(size))
            x = np.moveaxis(np.moveaxis(x, axis, -1) @ matrix.T, -1, axis)
        return (x,)


def evaluate(model: ModelProto, x: np.ndarray, operators=(Erf, Gelu, Resize)) -> dict:
    evaluator = ReferenceEvaluator(model, new_ops=list(operators))
    values = evaluator.run(None, {model.graph.input[0].name: x})
    return dict(zip(evaluator.output_names, values, strict=True))


@pytest.mark.parametrize("size", [(14, 10), (5, 7), (3, 20), (7, 5)], ids=str)
def test_resize_is_the_reference_implementations(size) -> None:
    author = Author(20)
    sizes = author.constant("sizes", np.array(size))
    author.resize(Value("x"), sizes, (1, 2), "y")
    model = author.finish("resize", {"x": (2, 7, 5, 3)}, {"y": (2, *size, 3)})
    x = np.random.default_rng(0).standard_normal((2, 7, 5, 3))
    ((_, got),) = evaluate(model, x).items()
    ((_, expected),) = evaluate(model, x, ()).items()
    assert got.shape == expected.shape == (2, *size, 3)
    assert np.abs(got - expected).max() < 1e-14


def test_erf_is_that_of_pythons_mathematics() -> None:
    x = np.linspace(-6, 6, 1001)
    assert np.abs(erf(x) - [math.erf(value) for value in x]).max() < 1e-15


@pytest.fixture
def difference64(monkeypatch, make_case, pixels):
    """Return `difference(case, image size, size, ...)`: of the graph to the network, float64."""
    monkeypatch.setattr(coat, "Author", Author64)

    def difference(case, image_size, size, features=False, **choices) -> float:
        # Not float32's numbers, so that a fold which rounds is found out.
        weights = {k: v.astype(np.float64) * (1 + 2**-30) for k, v in case.weights.items()}
        case = type(case)(case.spec, weights)
        x = pixels(2, image_size).astype(np.float64)
        got = evaluate(case.graph(size, features=features, **choices), x)
        expected = case.eager(x, features)
        assert got.keys() == expected.keys()
        return max(np.abs(got[name] - expected[name]).max() for name in expected)

    return difference


@pytest.mark.parametrize("form", FORM_CHOICES.values(), ids=FORM_CHOICES)
@pytest.mark.parametrize("name", TOYS)
def test_every_form_is_the_network(difference64, make_case, name, form) -> None:
    for features in (False, True):
        assert difference64(make_case(name), (75, 50), (75, 50), features, form=form) < 1e-10


@pytest.mark.parametrize("name", TOYS)
def test_a_dynamic_graph_is_the_network(difference64, make_case, name) -> None:
    for image_size in ((75, 50), (33, 47)):
        for form in FORM_CHOICES.values():
            assert difference64(make_case(name), image_size, None, form=form) < 1e-10


@pytest.mark.parametrize("opset", OPSETS)
@pytest.mark.parametrize("name", TOYS)
def test_every_opset_is_the_network(difference64, make_case, name, opset) -> None:
    assert difference64(make_case(name), (64, 64), (64, 64), opset=opset) < 1e-10


@pytest.mark.parametrize("model_args", ABLATIONS, ids=str)
@pytest.mark.parametrize("name", TOYS)
def test_every_ablation_is_the_network(difference64, make_case, name, model_args) -> None:
    case = make_case(name, **model_args)
    assert difference64(case, (75, 50), (75, 50)) < 1e-10
    assert difference64(case, (75, 50), None, features=True) < 1e-10


@pytest.mark.parametrize("num_classes", [0, 1, 10])
@pytest.mark.parametrize("name", TOYS)
def test_every_classifier_is_the_network(difference64, make_case, name, num_classes) -> None:
    assert difference64(make_case(name, num_classes), (64, 64), (64, 64)) < 1e-10


@pytest.mark.parametrize("name", NANOS)
def test_a_nano_is_the_network(difference64, make_case, name) -> None:
    for size in ((64, 64), None):
        for form in FORM_CHOICES.values():
            assert difference64(make_case(name), (64, 64), size, form=form) < 1e-10
