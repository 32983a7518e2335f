import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from coat_deploy.graph.gemm import Gemm, author_gemm
from coat_deploy.runner import INPUT

SMALL = Gemm(side=16, products=2)


@pytest.fixture
def left() -> np.ndarray:
    return np.random.default_rng(3).standard_normal(SMALL.input_shape, np.float32)


def rights(precision: str) -> list[np.ndarray]:
    """The right matrices as they stand in the graph, (48, 16)."""
    from onnx import numpy_helper

    graph = author_gemm(SMALL, precision).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return [tensors[f"right{i}"] for i in range(SMALL.products)]


def run(precision: str, left: np.ndarray) -> np.ndarray:
    (output,) = ReferenceEvaluator(author_gemm(SMALL, precision)).run(None, {INPUT: left})
    return output


def test_floats_are_multiplied_by_every_matrix_and_summed(left):
    expected = left.reshape(16, 48) @ sum(rights("fp32"))
    np.testing.assert_allclose(run("fp32", left), expected, rtol=1e-4, atol=1e-4)


def test_integers_give_the_product_to_the_rounding_of_the_left_matrix(left):
    expected = left.reshape(16, 48) @ sum(rights("int8"))
    step = (left.max() - left.min()) / 255
    bound = step * np.abs(sum(map(np.abs, rights("int8")))).sum(0)
    assert (np.abs(run("int8", left) - expected) <= bound).all()


def test_right_matrices_differ_so_that_no_product_can_be_saved():
    first, second = rights("fp32")
    assert not np.array_equal(first, second)


def test_operations_are_two_for_every_element_of_every_product():
    assert SMALL.operations == 2 * 2 * (16 * 48 * 16)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_graph_is_valid(precision):
    onnx.checker.check_model(author_gemm(SMALL, precision), full_check=True)


def test_int8_multiplies_integers():
    kinds = {node.op_type for node in author_gemm(SMALL, "int8").graph.node}
    assert "MatMulInteger" in kinds and "MatMul" not in kinds
