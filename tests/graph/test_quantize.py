"""Weights as integers: within half a step, row by row."""

import numpy as np
import pytest

from coat_deploy.graph.quantize import MOST, quantize_rows


def draw(*shape: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).standard_normal(shape)


def test_a_weight_is_kept_to_half_a_step_of_its_row() -> None:
    weight = draw(20, 30) * 10.0 ** np.arange(-10, 10)[:, None]
    integers, scale = quantize_rows(weight)
    assert integers.dtype == np.int8
    error = np.abs(integers * scale[:, None] - weight)
    assert (error <= 0.5 * scale[:, None] * (1 + 1e-12)).all()


def test_the_largest_entry_of_a_row_is_kept() -> None:
    weight = draw(20, 30)
    integers, scale = quantize_rows(weight)
    assert (np.abs(integers).max(axis=1) == MOST).all()
    assert np.abs(weight).max(axis=1) == pytest.approx(MOST * scale)


def test_two_products_fit_into_sixteen_bits() -> None:
    assert 2 * 255 * MOST <= np.iinfo(np.int16).max < 2 * 255 * (MOST + 1)


def test_a_row_of_zeros_stays_zero() -> None:
    weight = draw(3, 4)
    weight[1] = 0
    integers, scale = quantize_rows(weight)
    assert (integers[1] == 0).all()
    assert np.isfinite(scale).all()
