"""PyTorch's exporter as an oracle: slow, so few cases."""

import functools
import logging
import sys
from dataclasses import replace

import numpy as np
import pytest

from coat_deploy.errors import BackendMissing, GraphError
from coat_deploy.graph.check import check_graph
from coat_deploy.graph.coat import GraphOptions
from coat_deploy.graph.traced import trace_graph
from coat_deploy.network.variants import VARIANTS, get_variant

ROUNDING = 1e-5


def distance(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def test_a_traced_graph_takes_any_batch_and_agrees_with_eager_and_authored(
    make_case, pixels, open_session, capsys
) -> None:
    case = make_case("coat_lite_toy")
    model = trace_graph(case.spec, case.weights, GraphOptions((75, 50)))
    assert capsys.readouterr() == ("", "")
    check_graph(model)
    traced, authored = open_session(model), open_session(case.graph((75, 50)))
    for batch in (1, 3, 8):
        x = pixels(batch, (75, 50))
        got = traced(x)["logits"]
        assert distance(got, case.eager(x)["logits"]) < ROUNDING
        assert distance(got, authored(x)["logits"]) < ROUNDING


@pytest.fixture
def make_mite(make_case, monkeypatch):
    """Return `make(**model_args)`: of a CoaT smaller than the toy, to be traced sooner."""
    mite = replace(get_variant("coat_toy"), name="coat_mite", parallel_depth=1, windows=((3, 8),))
    monkeypatch.setitem(VARIANTS, "coat_mite", mite)
    return functools.partial(make_case, "coat_mite")


@pytest.mark.slow
def test_a_dynamic_traced_graph_takes_any_size(make_mite, pixels, open_session) -> None:
    case = make_mite()
    model = trace_graph(case.spec, case.weights, GraphOptions(None, features=True, opset=18))
    check_graph(model)
    assert model.opset_import[0].version == 18
    run = open_session(model)
    for batch, size in ((3, (64, 64)), (1, (75, 50)), (2, (33, 130))):
        x = pixels(batch, size)
        got, expected = run(x), case.eager(x, features=True)
        assert list(got) == list(expected)
        assert max(distance(got[name], expected[name]) for name in expected) < ROUNDING


@pytest.mark.slow
def test_direct_co_scale_can_be_traced(make_mite, pixels, open_session) -> None:
    case = make_mite(co_scale="direct")
    run = open_session(trace_graph(case.spec, case.weights, GraphOptions((64, 64))))
    for batch in (1, 3):
        x = pixels(batch)
        got = run(x)["logits"]
        assert distance(got, case.eager(x)["logits"]) < ROUNDING
    assert distance(got, make_mite().eager(x)["logits"]) > 0.01


@pytest.mark.parametrize("opset", [17, 24])
def test_an_opset_that_is_not_supported_is_refused(make_case, opset: int) -> None:
    case = make_case("coat_lite_toy")
    with pytest.raises(GraphError, match=f"opset {opset}: not supported"):
        trace_graph(case.spec, case.weights, GraphOptions((64, 64), opset=opset))


def test_a_size_below_the_minimum_is_refused(make_case) -> None:
    case = make_case("coat_lite_toy")
    with pytest.raises(GraphError, match="size 31x64: too small .* at least 32"):
        trace_graph(case.spec, case.weights, GraphOptions((31, 64)))


def test_a_missing_exporter_says_how_to_install_it(make_case, monkeypatch) -> None:
    case = make_case("coat_lite_toy")
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    monkeypatch.setitem(sys.modules, "onnxscript.ir", None)
    for name in [n for n in sys.modules if n.startswith("torch.onnx._internal.exporter")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BackendMissing, match=r'onnxscript.*pip install "coat-deploy\[torch\]"'):
        trace_graph(case.spec, case.weights, GraphOptions((64, 64)))


def test_a_failure_of_the_exporter_is_one_line_that_names_the_other_form(
    make_case, monkeypatch
) -> None:
    import torch

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("unsupported operator\nsecond line of many")

    monkeypatch.setattr(torch.onnx, "export", fail)
    level = logging.root.manager.disable
    case = make_case("coat_lite_toy")
    with pytest.raises(GraphError, match="RuntimeError: unsupported operator") as caught:
        trace_graph(case.spec, case.weights, GraphOptions((64, 64)))
    assert "\n" not in str(caught.value)
    assert "--form authored" in str(caught.value)
    assert logging.root.manager.disable == level
