"""Each fold alone, in float64: wrong algebra cannot hide behind rounding."""

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from coat_deploy.errors import GraphError
from coat_deploy.graph.folds import fold_head, fold_position, head_mask, merge_windows

LIMIT = 1e-10


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.Generator(np.random.PCG64([seed, *shape])).standard_normal(shape)


def depthwise(x: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    tensors = (torch.from_numpy(value) for value in (x, weight, bias))
    return conv2d(*tensors, padding=weight.shape[-1] // 2, groups=len(weight)).numpy()


# fold_position


@pytest.mark.parametrize("window", [1, 3, 5, 7])
def test_fold_position_equals_the_residual_convolution(window: int) -> None:
    x, weight, bias = draw(2, 6, 9, 4), draw(6, 1, window, window), draw(6)
    left = x + depthwise(x, weight, bias)
    right = depthwise(x, fold_position(weight), bias)
    assert np.abs(left - right).max() < LIMIT


def test_fold_position_leaves_the_weight_it_was_given_as_it_was() -> None:
    weight = draw(6, 1, 3, 3)
    before = weight.copy()
    fold_position(weight)
    assert np.array_equal(weight, before)


def test_fold_position_refuses_a_window_without_a_centre() -> None:
    with pytest.raises(GraphError, match=r"fold_position: .* odd \(got 4\)"):
        fold_position(draw(6, 1, 4, 4))


# merge_windows


@pytest.mark.parametrize(
    "windows", [(3, 5, 7), (7, 5, 3), (5, 1), (3, 3), (7,)], ids=lambda w: "-".join(map(str, w))
)
def test_merge_windows_equals_one_convolution_a_window(windows: tuple[int, ...]) -> None:
    weights = [draw(i + 2, 1, k, k, seed=i) for i, k in enumerate(windows)]
    biases = [draw(i + 2, seed=i) for i in range(len(windows))]
    maps = [draw(2, i + 2, 5, 8, seed=i) for i in range(len(windows))]
    left = np.concatenate([depthwise(*part) for part in zip(maps, weights, biases, strict=True)], 1)
    right = depthwise(np.concatenate(maps, 1), merge_windows(weights), np.concatenate(biases))
    assert np.abs(left - right).max() < LIMIT


@pytest.mark.parametrize("windows", [(3, 4), (4, 7), (2, 4), (4,)])
def test_merge_windows_refuses_a_window_without_a_centre(windows: tuple[int, ...]) -> None:
    even = next(window for window in windows if window % 2 == 0)
    with pytest.raises(GraphError, match=rf"merge_windows: .* odd \(got {even}\)"):
        merge_windows([draw(2, 1, k, k) for k in windows])


# head_mask


@pytest.mark.parametrize(("channels", "num_heads"), [(24, 8), (16, 2), (6, 6), (5, 1)])
def test_head_mask_equals_one_small_product_a_head(channels: int, num_heads: int) -> None:
    s, v, scale = draw(channels, 11), draw(11, channels), (channels / num_heads) ** -0.5
    width = channels // num_heads
    left = np.zeros((channels, channels))
    for head in range(num_heads):
        part = slice(head * width, (head + 1) * width)
        left[part, part] = scale * (s[part] @ v[:, part])
    right = head_mask(channels, num_heads, scale) * (s @ v)
    assert np.abs(left - right).max() < LIMIT


def test_head_mask_refuses_heads_that_do_not_divide_the_channels() -> None:
    with pytest.raises(GraphError, match="head_mask: 8 heads do not divide 20 channels"):
        head_mask(20, 8, 1.0)


# fold_head


def test_fold_head_equals_aggregating_and_classifying() -> None:
    aggregate, aggregate_bias = draw(3), draw(1)
    weight, bias, tokens = draw(7, 24), draw(7), draw(5, 3, 24)
    aggregated = np.einsum("s,bsc->bc", aggregate, tokens) + aggregate_bias
    left = aggregated @ weight.T + bias
    folded, folded_bias = fold_head(aggregate, aggregate_bias, weight, bias)
    right = np.concatenate([tokens[:, s] for s in range(3)], axis=1) @ folded.T + folded_bias
    assert np.abs(left - right).max() < LIMIT


# Identities of conv-attention that `graph/attention.py` builds on without a function


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_context_of_values_equals_the_projected_context_of_tokens() -> None:
    s, x, weight, bias = softmax(draw(2, 6, 17)), draw(2, 17, 6), draw(6, 6), draw(6)
    left = s @ (x @ weight.T + bias)
    right = (s @ x) @ weight.T + bias
    assert np.abs(left - right).max() < LIMIT


def test_softmax_over_tokens_does_not_see_the_bias_of_keys() -> None:
    x, weight, bias = draw(2, 17, 6), draw(6, 6), 3 * draw(6)
    left = softmax((x @ weight.T + bias).swapaxes(1, 2))
    right = softmax(weight @ x.swapaxes(1, 2))
    assert np.abs(left - right).max() < LIMIT


def test_folds_keep_float64() -> None:
    arrays = (
        fold_position(draw(2, 1, 3, 3)),
        merge_windows([draw(2, 1, 3, 3), draw(1, 1, 5, 5)]),
        head_mask(8, 2, 0.5),
        *fold_head(draw(3), draw(1), draw(4, 6), draw(4)),
    )
    assert {array.dtype for array in arrays} == {np.dtype(np.float64)}
