"""Weight algebra: identities that make a graph smaller without changing what it computes.

Each function is one identity, written left = right; the graph uses the right side. All take and
return numpy arrays and keep float64 when given it, so that tests can hold them to 1e-10.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from coat_deploy.errors import GraphError
from coat_deploy.graph.layer import Floats, Layer

NormFold = Literal["bias", "channel"]
"""Where a norm's affine part may go: `fold_norm_to_bias`, `fold_norm_to_channel`."""

MAX_AMPLIFICATION = 4.0
"""`fold_norm_to_channel` is left out where rounding errors could grow by more than this."""


@dataclass(frozen=True)
class Norm:
    """The affine part of a LayerNorm: `gamma * xhat + beta`, both (C,); no beta is one of zeros."""

    gamma: Floats
    beta: Floats | None


def fold_position(weight: Floats) -> Floats:
    """X + DWConv(X) = DWConv'(X), with 1 added at the centre tap of `weight` (C, 1, k, k).

    Needs: an odd window.
    """
    window = weight.shape[-1]
    if window % 2 == 0:
        raise GraphError(f"fold_position: the window must be odd (got {window}).")
    folded = weight.copy()
    folded[:, 0, window // 2, window // 2] += 1
    return folded


def merge_windows(weights: Sequence[Floats]) -> Floats:
    """concat(dwconv3(x_1), dwconv5(x_2), dwconv7(x_3)) = dwconv7(concat(x_1, x_2, x_3)).

    `weights` (C_i, 1, k_i, k_i) are padded with zero rims to the largest window and put one
    after another: more multiplications, but one node and no slices. Needs: odd windows.
    """
    window = max(weight.shape[-1] for weight in weights)
    padded = []
    for weight in weights:
        if weight.shape[-1] % 2 == 0:
            raise GraphError(f"merge_windows: windows must be odd (got {weight.shape[-1]}).")
        rim = (window - weight.shape[-1]) // 2
        padded.append(np.pad(weight, ((0, 0), (0, 0), (rim, rim), (rim, rim))))
    return np.concatenate(padded)


def head_mask(channels: int, num_heads: int, scale: float) -> Floats:
    """Return (C, C): `scale` where row and column belong to one head, else 0.

    s * per_head(S_h V_h) = mask * (S V): one dense product and a mask for h small ones; the
    attention's scale rides along. Needs: heads that divide the channels.
    """
    if channels % num_heads:
        raise GraphError(f"head_mask: {num_heads} heads do not divide {channels} channels.")
    return np.kron(np.eye(num_heads), np.full((channels // num_heads,) * 2, scale))


def fold_head(
    aggregate: Floats, aggregate_bias: Floats, weight: Floats, bias: Floats
) -> tuple[Floats, Floats]:
    """W (a_2 c_2 + a_3 c_3 + a_4 c_4 + d) + b = W' concat(c_2, c_3, c_4) + b'.

    `aggregate` (3,), `aggregate_bias` (1,), `weight` (K, C), `bias` (K,); returns (K, 3C), (K,).
    """
    folded = np.concatenate([a * weight for a in aggregate], axis=1)
    return folded, bias + aggregate_bias * weight.sum(axis=1)


def fold_norm(
    norm: Norm, layers: Sequence[Layer], where: NormFold | None
) -> tuple[Norm, list[Layer]]:
    """Return a norm and the layers behind it with its affine part folded, or as they are."""
    if where == "bias":
        return fold_norm_to_bias(norm, layers)
    if where == "channel":
        return fold_norm_to_channel(norm, layers)
    return norm, list(layers)


def fold_norm_to_bias(norm: Norm, layers: Sequence[Layer]) -> tuple[Norm, list[Layer]]:
    """W (gamma * xhat + beta) + b = (W * gamma) xhat + (b + W beta)."""
    plain = Norm(np.ones_like(norm.gamma), None)
    return plain, [
        Layer(norm.gamma * layer.weight, _with_beta(norm, layer), layer.int8) for layer in layers
    ]


def fold_norm_to_channel(norm: Norm, layers: Sequence[Layer]) -> tuple[Norm, list[Layer]]:
    """W LN(x) + b = W' LN'(x): the norm's affine part moves into the layers that read it.

    LayerNorm takes the mean away, so sum_c xhat_c = 0 and one channel r says nothing new:
    xhat_r = -sum of the others. LN' puts a 1 in its place (gamma' is 1 and beta' 0, but at r the
    other way round), and that 1 carries the bias:

        W'_c = gamma_c W_c - gamma_r W_r   (c != r),     W'_r = b + W beta

    So every layer behind a norm is a product without a bias to add. Which channel is r, and
    whether it pays: `redundant_channel`, `amplification`. Returns what it was given, where
    errors could grow by more than MAX_AMPLIFICATION.
    """
    r = redundant_channel(norm.gamma, [layer.weight for layer in layers])
    if max(amplification(norm.gamma, layer.weight, r) for layer in layers) > MAX_AMPLIFICATION:
        return norm, list(layers)
    gamma, beta = np.ones(len(norm.gamma)), np.zeros(len(norm.gamma))
    gamma[r], beta[r] = 0, 1
    folded = []
    for layer in layers:
        weight = _without_channel(norm.gamma, layer.weight, r)
        weight[:, r] = _with_beta(norm, layer)
        folded.append(Layer(weight, None))
    return Norm(gamma, beta), folded


def outer_bias(norm: Norm, layer: Layer) -> Floats:
    """Return B (C, C_out) of xhat' B = 1 b^T: the bias of `layer` as a product.

    `norm` is of `fold_norm_to_channel`: B has b in the row of the channel that is always 1.
    """
    assert norm.beta is not None and layer.bias is not None
    return np.outer(norm.beta, layer.bias)


def redundant_channel(gamma: Floats, weights: Sequence[Floats]) -> int:
    """Return the channel whose removal by `fold_norm_to_channel` lets errors grow least.

    It is the one that weighs least in the layers: the least `|gamma_r| max_o |W_or|`, each layer
    measured by its own largest row.
    """
    parts = [np.abs(gamma * weight) for weight in weights]
    shares = [part.max(axis=0) / (part.sum(axis=1).max() or 1) for part in parts]
    return int(np.argmin(np.max(shares, axis=0)))


def amplification(gamma: Floats, weight: Floats, channel: int) -> float:
    """Return how much more rounding may err in `W' LN'(x)` than in `W LN(x)`: a bound.

    A product of rows w and x in floating point errs by at most a small multiple of the unit
    roundoff times sum_c |w_c| |x_c| (Higham, Accuracy and Stability of Numerical Algorithms,
    section 3.1). This is the ratio of the largest such sums, |xhat| taken as 1: 1 where the
    channel weighs nothing, at most 2 where one row is all there is.
    """
    before = np.abs(gamma * weight).sum(axis=1).max()
    after = np.abs(_without_channel(gamma, weight, channel)).sum(axis=1).max()
    return float(after / before) if before else 1.0


def _with_beta(norm: Norm, layer: Layer) -> Floats:
    """Return `b + W beta`."""
    bias = np.zeros(len(layer.weight)) if layer.bias is None else layer.bias
    return bias if norm.beta is None else layer.weight @ norm.beta + bias


def _without_channel(gamma: Floats, weight: Floats, channel: int) -> Floats:
    """Return W' of `fold_norm_to_channel` with zeros in the place of the bias."""
    scaled = gamma.astype(np.float64) * weight
    return scaled - scaled[:, [channel]]
