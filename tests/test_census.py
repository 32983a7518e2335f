import pytest

from coat_deploy.census import Asked, Census, EngineLayer
from coat_deploy.errors import GraphError

NORM, FC1 = "serial_blocks1.0.norm1", "serial_blocks1.0.mlp.fc1"
CENSUS = Census(
    (
        EngineLayer(NORM, "NORMALIZATION", NORM, "fp32"),
        EngineLayer(FC1, "MATRIX_MULTIPLY", FC1, "fp16"),
        EngineLayer("fc1_12", "ELEMENTWISE", FC1, "fp16"),
        EngineLayer("logits", "MATRIX_MULTIPLY", "logits", "fp16"),
    )
)
ASKED = {NORM: "fp32", FC1: "fp16", "logits": "fp16"}


def test_layers_that_compute_as_asked_pass() -> None:
    CENSUS.check(Asked(ASKED, tuple(ASKED)), "toy")


def test_every_layer_that_does_not_is_named() -> None:
    asked = Asked(ASKED | {FC1: "fp32"}, tuple(ASKED))
    with pytest.raises(GraphError) as caught:
        CENSUS.check(asked, "toy")
    assert "toy: 2 of 4 layers do not compute as asked" in str(caught.value)
    assert "serial_blocks1.0.mlp.fc1 (matrix_multiply) in fp16, not fp32" in str(caught.value)
    assert "fc1_12 (elementwise) in fp16, not fp32" in str(caught.value)


def test_a_node_of_which_nothing_is_known_is_not_taken_for_right() -> None:
    asked = Asked(ASKED | {"head": "fp16"}, (*ASKED, "head"))
    with pytest.raises(GraphError, match="no layer is known to be of 1 nodes: head"):
        CENSUS.check(asked, "toy")
    with pytest.raises(GraphError, match="no layer is known to be of 3 nodes"):
        Census(()).check(Asked(ASKED, tuple(ASKED)), "toy")


def test_layers_are_counted_by_precision_kind_and_stage() -> None:
    assert CENSUS.to_json() == {
        "layers": 4,
        "by_precision": {
            "fp16": {"layers": 3, "share": 0.75},
            "fp32": {"layers": 1, "share": 0.25},
        },
        "by_kind": {
            "elementwise": {"fp16": 1},
            "matrix_multiply": {"fp16": 2},
            "normalization": {"fp32": 1},
        },
        "by_stage": {"logits": {"fp16": 1}, "serial_blocks1": {"fp16": 2, "fp32": 1}},
    }
