"""Conv-attention in ONNX operators: `network/attention.py`, restated.

    ConvAtt(X) = Q / sqrt(c) (softmax_N(K)^T V) + Q * DWConv(P, V)

What differs from the network's file, and why:
1. K is computed transposed, `K^T = Wk X^T` (B, C, N), where a runtime likes it: softmax over tokens
   then runs along the last axis. It needs no bias then: softmax over tokens does not see it.
2. Heads are never split. The context of all heads is one (C, C) product under a block-diagonal
   mask, which also carries 1 / sqrt(c).
3. The windows of CRPE are merged to one depthwise convolution.
4. The class token travels apart, as the network treats it apart in CRPE anyway.

Letters as in the network: B batch, N = 1 + H*W tokens, C channels.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from coat_deploy.graph.author import Author, Value
from coat_deploy.graph.folds import Norm, head_mask, merge_windows, outer_bias
from coat_deploy.graph.form import GraphForm
from coat_deploy.graph.layer import Floats, Layer
from coat_deploy.graph.tokens import Tokens, from_map, join_tokens, rows, to_map

Weights = Mapping[str, Floats]


def read_linear(weights: Weights, path: str, form: GraphForm) -> Layer:
    """Return the linear layer that `path` leads to, as the form computes it."""
    return form.linear(weights[f"{path}.weight"], weights[f"{path}.bias"])


def read_products(weights: Weights, path: str, form: GraphForm) -> list[Layer]:
    """Return the layers of Q, K and V, cut from the joint `qkv` of the attention at `path`."""
    weight, bias = weights[f"{path}.qkv.weight"], weights[f"{path}.qkv.bias"]
    return [form.linear(*part) for part in zip(np.split(weight, 3), np.split(bias, 3), strict=True)]


def conv_attention(
    a: Author,
    weights: Weights,
    path: str,
    x: Tokens,
    norm: Norm,
    products: Sequence[Layer],
    crpe: str,
    form: GraphForm,
    num_heads: int,
) -> Tokens:
    """Return conv-attention with its output projection, of normed tokens.

    `path` leads to the attention's weights, `crpe` to the scale's shared encoding; `products`
    are the layers of Q, K and V behind `norm`.
    """
    channels, (q, k, v) = x.grid.channels, products
    mask = head_mask(channels, num_heads, (channels / num_heads) ** -0.5)
    proj = read_linear(weights, f"{path}.proj", form)
    with a.scope("factoratt_crpe"):
        v_image = a.linear(x.image, v, "v")
        context = _context(a, x, k, v, v_image, mask, form)  # (B, C, C)
        q_image = a.linear(x.image, q, "q")
        ev = _encode(a, weights, x, q_image, v_image, crpe)
        if q.bias is None and x.grid.num_tokens >= form.fold_proj_ratio * channels:
            return _folded(a, x, q, context, ev, proj, outer_bias(norm, proj))
        return Tokens(
            _image(a, x, q_image, context, ev, proj), _class_token(a, x, q, context, proj), x.grid
        )


def _context(
    a: Author,
    x: Tokens,
    k: Layer,
    v: Layer,
    v_image: Value,
    mask: Floats,
    form: GraphForm,
) -> Value:
    """Return softmax_N(K)^T V of every head, scaled, on the diagonal of (B, C, C)."""
    channels = x.grid.channels
    tokens = join_tokens(a, x, "tokens")  # (B, N, C)
    s = _softmax_of_keys(a, x, tokens, k, form)  # (B, C, N)
    if x.grid.num_tokens >= form.fold_context_ratio * channels:
        mixed = rows(a, a.matmul(s, tokens, "mix"), channels)  # (B*C, C)
        exact = replace(v, int8=False)  # small, and the whole image goes through it
        context = a.linear(mixed, exact, "context", key=a.path("v"))
        context = a.reshape(context, a.integers(-1, channels, channels), "context_map")
    else:
        v_cls = a.linear(x.cls, v, "v_cls", key=a.path("v"))
        context = a.matmul(s, join_tokens(a, Tokens(v_image, v_cls, x.grid), "v_tokens"), "context")
    return a.mul(context, a.constant(_mask_name(mask), mask), "heads")


def _softmax_of_keys(a: Author, x: Tokens, tokens: Value, k: Layer, form: GraphForm) -> Value:
    """Return softmax_N(K)^T (B, C, N) of `x`, whose tokens are joined to (B, N, C)."""
    if form.keys == "transposed":
        k_weight = a.constant(a.path("k.weight"), k.weight)
        keys = a.matmul(k_weight, a.transpose(tokens, (0, 2, 1), "tokens_t"), "k_t")
        return a.softmax(keys, "softmax")
    keys = a.linear(rows(a, tokens, x.grid.channels), replace(k, int8=False), "k")
    keys = a.softmax(a.reshape(keys, x.grid.joined_shape, "k_tokens"), "softmax", axis=1)
    return a.transpose(keys, (0, 2, 1), "softmax_t")


def _mask_name(mask: Floats) -> str:
    return f"head_mask_{mask.shape[0]}_{np.count_nonzero(mask[0])}"


def _encode(
    a: Author, weights: Weights, x: Tokens, q_image: Value, v_image: Value, crpe: str
) -> Value | None:
    """Return Q * DWConv(V) of the image rows; None in the ablation without CRPE."""
    windows = sorted(key for key in weights if key.startswith(f"{crpe}.conv_list."))
    if not windows:
        return None
    weight = merge_windows([weights[key] for key in windows if key.endswith("weight")])
    bias = np.concatenate([weights[key] for key in windows if key.endswith("bias")])
    with a.scope("crpe"):
        encoded = a.depthwise(to_map(a, v_image, x.grid), weight, bias, "conv", key=crpe)
        return a.mul(q_image, from_map(a, encoded, x.grid.channels), "ev")


def _image(
    a: Author, x: Tokens, q_image: Value, context: Value, ev: Value | None, proj: Layer
) -> Value:
    """Return the projected image rows: (Q context + EV) Wp^T + bp."""
    tokens = a.reshape(q_image, x.grid.token_shape, "q_tokens")
    image = rows(a, a.matmul(tokens, context, "factor_att"), x.grid.channels)
    if ev is not None:
        image = a.add(image, ev, name="conv_att")
    return a.linear(image, proj, "proj")


def _class_token(a: Author, x: Tokens, q: Layer, context: Value, proj: Layer) -> Value:
    """Return the projected class tokens: (Q context) Wp^T + bp."""
    channels = x.grid.channels
    q_cls = a.linear(x.cls, q, "q_cls", key=a.path("q"))
    q_cls = a.reshape(q_cls, a.integers(-1, 1, channels), "q_cls_token")
    cls = rows(a, a.matmul(q_cls, context, "factor_att_cls"), channels)
    return a.linear(cls, proj, "proj_cls", key=a.path("proj"))


def _folded(
    a: Author,
    x: Tokens,
    q: Layer,
    context: Value,
    ev: Value | None,
    proj: Layer,
    bias: Floats,
) -> Tokens:
    """Return projected tokens, Q and projection folded into the context: `fold_proj_ratio`."""
    channels = x.grid.channels
    matrix = a.constant(a.path("proj.weight"), proj.weight.T)
    left = a.matmul(a.constant(a.path("q.weight_t"), q.weight.T), context, "q_context")
    folded = a.matmul(left, matrix, "q_context_proj")
    folded = a.add(folded, a.constant(a.path("proj.bias_row"), bias), name="q_context_proj_bias")
    image_tokens = a.reshape(x.image, x.grid.token_shape, "image_tokens")
    image = rows(a, a.matmul(image_tokens, folded, "factor_att_proj"), channels)
    if ev is not None:
        image = a.add(image, a.matmul(ev, matrix, "ev_proj"), name="proj")
    cls_tokens = a.reshape(x.cls, a.integers(-1, 1, channels), "cls_token")
    return Tokens(image, rows(a, a.matmul(cls_tokens, folded, "proj_cls"), channels), x.grid)
