"""A graph of large matrix products and nothing else, to measure how fast a runtime multiplies."""

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto, TensorProto

from coat_deploy.graph.author import Author, Value
from coat_deploy.runner import INPUT

INT8 = "int8"
"""The one precision that is written into a graph; the others a runtime chooses by itself."""


@dataclass(frozen=True)
class Gemm:
    """`products` times (side, 3 side) x (3 side, side), of one left matrix, summed.

    The left matrix is the input, of the shape of an image; what is quantised or rounded of it is
    shared by all products, and the output is small, so that hardly anything but products is timed.
    """

    side: int = 1024
    products: int = 3

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """Shape of the input: (1, 3, side, side)."""
        return (1, 3, self.side, self.side)

    @property
    def operations(self) -> int:
        """Multiplications and additions of one run."""
        return 2 * self.products * 3 * self.side**3


def author_gemm(gemm: Gemm, precision: str) -> ModelProto:
    """Return the graph of `gemm`: integer products (u8 by s8) for int8, else of floats.

    The right matrices are random: products of zeros are not what a network computes.
    """
    author = Author()
    shape = author.integers(gemm.side, 3 * gemm.side)
    left = author.reshape(Value(INPUT), shape, "left")
    output = _integers(author, left, gemm) if precision == INT8 else _floats(author, left, gemm)
    return author.finish("gemm", {INPUT: gemm.input_shape}, {output: (gemm.side, gemm.side)})


def _floats(author: Author, left: Value, gemm: Gemm) -> Value:
    generator = np.random.default_rng(0)
    terms = []
    for i in range(gemm.products):
        right = generator.standard_normal((3 * gemm.side, gemm.side), np.float32)
        terms.append(author.matmul(left, author.constant(f"right{i}", right), f"product{i}"))
    return author.node("Sum", terms, "sum")[0]


def _integers(author: Author, left: Value, gemm: Gemm) -> Value:
    generator = np.random.default_rng(0)
    rows, scale, zero = author.node("DynamicQuantizeLinear", (left,), "quantise", outputs=3)
    total: Value | None = None
    for i in range(gemm.products):
        right = generator.integers(-127, 128, (3 * gemm.side, gemm.side)).astype(np.float32)
        wide = author.constant(f"right{i}", right)
        # A constant again once the graph is loaded, since runtimes compute what is constant.
        narrow = author.node("Cast", (wide,), f"narrow{i}", to=TensorProto.INT8)[0]
        product = author.node("MatMulInteger", (rows, narrow, zero), f"product{i}")[0]
        total = product if total is None else author.add(total, product, name=f"sum{i}")
    assert total is not None
    floats = author.node("Cast", (total,), "float", to=TensorProto.FLOAT)[0]
    return author.mul(floats, scale, "scaled")
