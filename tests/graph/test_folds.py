"""Each fold alone, in float64: wrong algebra cannot hide behind rounding."""

import numpy as np
import pytest
import torch
from torch.nn.functional import conv2d

from coat_deploy.errors import GraphError
from coat_deploy.graph.folds import (
    MAX_AMPLIFICATION,
    Norm,
    amplification,
    fold_head,
    fold_norm,
    fold_norm_to_bias,
    fold_norm_to_channel,
    fold_position,
    head_mask,
    merge_windows,
    outer_bias,
    redundant_channel,
)
from coat_deploy.graph.layer import Layer

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


def test_q_and_the_projection_fold_into_the_context() -> None:
    """(Q c + e) Wp^T + bp = xhat' (Wq'^T c Wp^T + B) + e Wp^T, where xhat' is of a norm folded."""
    norm, context, ev = Norm(1 + 0.1 * draw(6), draw(6, seed=1)), draw(6, 6, seed=2), draw(17, 6)
    q, proj = draw_layers(6, 6, 6)
    x = 3 * draw(17, 6, seed=3) + 5
    left = linear(linear(layer_norm(x, norm), q) @ context + ev, proj)
    folded, (q,) = fold_norm_to_channel(norm, [q])
    matrix = q.weight.T @ context @ proj.weight.T + outer_bias(folded, proj)
    right = layer_norm(x, folded) @ matrix + ev @ proj.weight.T
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


# Norms


def layer_norm(x: np.ndarray, norm: Norm, eps: float = 1e-6) -> np.ndarray:
    """LayerNorm as written, in the precision of `x`."""
    centred = x - x.mean(axis=-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + x.dtype.type(eps))
    beta = 0 if norm.beta is None else norm.beta
    return (centred / deviation * norm.gamma + beta).astype(x.dtype)


def linear(x: np.ndarray, layer: Layer) -> np.ndarray:
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def draw_layers(channels: int, *widths: int, seed: int = 0) -> list[Layer]:
    return [Layer(draw(n, channels, seed=seed) / channels**0.5, draw(n, seed=seed)) for n in widths]


def uneven(channels: int, seed: int) -> np.ndarray:
    """Scales from 1e-3 to 10 of both signs, and one that is nearly zero."""
    random = np.random.Generator(np.random.PCG64(seed))
    gamma = 10 ** random.uniform(-3, 1, channels) * random.choice([-1, 1], channels)
    gamma[random.integers(channels)] = 1e-12
    return gamma


NORMS = {
    "trained": 1 + 0.2 * draw(48),
    "uneven": uneven(48, 1),
    "all the same": np.full(48, 0.7),
    "one is zero": np.where(np.arange(48) == 7, 0.0, 1 + 0.1 * draw(48)),
    "all but one are zero": np.where(np.arange(48) == 7, 2.0, 0.0),
    "all are zero": np.zeros(48),
}


@pytest.mark.parametrize("gamma", NORMS.values(), ids=NORMS)
def test_fold_norm_to_bias_equals_the_norm_and_its_layers(gamma: np.ndarray) -> None:
    norm, layers = Norm(gamma, draw(48, seed=2)), draw_layers(48, 30, 64)
    layers.append(Layer(draw(5, 48), None))
    x = 3 * draw(20, 48) + 5
    folded, read = fold_norm_to_bias(norm, layers)
    assert folded.beta is None and (folded.gamma == 1).all()
    for before, after in zip(layers, read, strict=True):
        left, right = linear(layer_norm(x, norm), before), linear(layer_norm(x, folded), after)
        assert np.abs(left - right).max() < LIMIT


def test_fold_norm_does_what_the_form_asks_for() -> None:
    norm, layers = Norm(1 + 0.1 * draw(16), draw(16, seed=1)), draw_layers(16, 5)
    assert fold_norm(norm, layers, None) == (norm, layers)
    assert [layer.bias is None for layer in fold_norm(norm, layers, "bias")[1]] == [False]
    assert [layer.bias is None for layer in fold_norm(norm, layers, "channel")[1]] == [True]


@pytest.mark.parametrize("gamma", NORMS.values(), ids=NORMS)
def test_fold_norm_to_channel_equals_the_norm_and_its_layers(gamma: np.ndarray) -> None:
    norm, layers = Norm(gamma, draw(48, seed=2)), draw_layers(48, 30, 64)
    x = 3 * draw(20, 48) + 5
    folded, read = fold_norm_to_channel(norm, layers)
    assert [layer.bias for layer in read] == [None, None]
    for before, after in zip(layers, read, strict=True):
        left, right = linear(layer_norm(x, norm), before), linear(layer_norm(x, folded), after)
        assert np.abs(left - right).max() < LIMIT


def test_fold_norm_to_channel_takes_a_layer_without_bias() -> None:
    norm, layer = Norm(1 + 0.1 * draw(16), draw(16, seed=1)), Layer(draw(5, 16), None)
    folded, (read,) = fold_norm_to_channel(norm, [layer])
    x = draw(9, 16)
    left, right = linear(layer_norm(x, norm), layer), linear(layer_norm(x, folded), read)
    assert np.abs(left - right).max() < LIMIT


def test_fold_norm_to_channel_puts_a_one_where_the_redundant_channel_was() -> None:
    folded, _ = fold_norm_to_channel(Norm(1 + 0.1 * draw(16), draw(16, seed=1)), draw_layers(16, 5))
    ones = layer_norm(draw(9, 16), folded) == 1
    assert (ones.sum(axis=1) == 1).all()
    assert ones.all(axis=0).sum() == 1


@pytest.mark.parametrize("seed", range(20))
def test_fold_norm_to_channel_errs_in_float32_within_its_bound(seed: int) -> None:
    """A mean of 100 deviations: what rounding leaves of the mean is seen by every channel."""
    norm, layers = Norm(uneven(64, seed), draw(64, seed=seed)), draw_layers(64, 96, seed=seed)
    x = draw(200, 64, seed=seed) + 100 * draw(200, 1, seed=seed)
    truth = linear(layer_norm(x, norm), layers[0])
    folded, (read,) = fold_norm_to_channel(norm, layers)
    errors = []
    for n, layer in ((norm, layers[0]), (folded, read)):
        n = Norm(n.gamma.astype(np.float32), n.beta.astype(np.float32))
        bias = None if layer.bias is None else layer.bias.astype(np.float32)
        single = Layer(layer.weight.astype(np.float32), bias)
        errors.append(np.abs(linear(layer_norm(x.astype(np.float32), n), single) - truth).max())
    before, after = errors
    channel = redundant_channel(norm.gamma, [layers[0].weight])
    bound = amplification(norm.gamma, layers[0].weight, channel)
    assert bound < 2
    assert after < max(bound, 1) * before * 1.5  # the largest of 19,200 errors, not their bound


@pytest.mark.parametrize("gamma", NORMS.values(), ids=NORMS)
def test_the_redundant_channel_lets_errors_grow_least(gamma: np.ndarray) -> None:
    weight = draw(30, 48)
    growth = [amplification(gamma, weight, channel) for channel in range(48)]
    chosen = growth[redundant_channel(gamma, [weight])]
    assert chosen < 2
    assert chosen <= np.median(growth)


def test_one_row_lets_errors_grow_by_two_at_most() -> None:
    for seed in range(100):
        gamma, weight = uneven(32, seed), draw(1, 32, seed=seed)
        assert amplification(gamma, weight, redundant_channel(gamma, [weight])) <= 2


def test_fold_norm_to_channel_leaves_alone_what_would_lose_accuracy() -> None:
    """A row for each channel: none is small, and the one taken is spread over all others."""
    norm, layer = Norm(np.ones(32), draw(32)), Layer(np.eye(32), draw(32, seed=1))
    assert amplification(norm.gamma, layer.weight, 0) == 32 - 1 > MAX_AMPLIFICATION
    assert fold_norm_to_channel(norm, [layer]) == (norm, [layer])


def test_a_layer_that_would_lose_accuracy_keeps_its_companions_as_they_are() -> None:
    norm, fine = Norm(np.ones(32), draw(32)), draw_layers(32, 8)[0]
    layers = [fine, Layer(np.eye(32), draw(32, seed=1))]
    assert fold_norm_to_channel(norm, layers) == (norm, layers)
