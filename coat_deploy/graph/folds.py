"""Weight algebra: identities that make a graph smaller without changing what it computes.

Each function is one identity, written left = right; the graph uses the right side. All take and
return numpy arrays and keep float64 when given it, so that tests can hold them to 1e-10.
"""

from collections.abc import Sequence

import numpy as np

from coat_deploy.errors import GraphError
from coat_deploy.graph.author import Floats


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
