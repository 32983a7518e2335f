"""Serial and parallel blocks in ONNX operators: `network/blocks.py`, restated.

A block's outputs are named `<block>.image` (rows) and `<block>.cls`, or with the scale's number
behind them in a parallel block: the names by which blocks are compared with the network's.
"""

from collections.abc import Sequence

from coat_deploy.graph.attention import (
    Weights,
    conv_attention,
    read_linear,
    read_products,
)
from coat_deploy.graph.author import Author, Value
from coat_deploy.graph.folds import Norm, fold_norm, fold_position
from coat_deploy.graph.form import GraphForm
from coat_deploy.graph.tokens import (
    Grid,
    Tokens,
    from_map,
    join_tokens,
    part_tokens,
    rows,
    to_map,
)

LAYER_NORM_EPS = 1e-6
PARALLEL_SCALES = (2, 3, 4)


def conv_position(a: Author, weights: Weights, path: str, x: Tokens, form: GraphForm) -> Tokens:
    """Return tokens with CPE, X + DWConv(X); unchanged where it is left out.

    `path` leads to the scale's shared encoding, "cpe1" to "cpe4".
    """
    if f"{path}.proj.weight" not in weights:
        return x
    weight, bias = weights[f"{path}.proj.weight"], weights[f"{path}.proj.bias"]
    if form.fold_position:
        weight = fold_position(weight)
    with a.scope("cpe"):
        feature_map = to_map(a, x.image, x.grid)
        encoded = a.depthwise(feature_map, weight, bias, "conv", key=path)
        if not form.fold_position:
            encoded = a.add(feature_map, encoded, name="sum")
        return Tokens(from_map(a, encoded, x.grid.channels), x.cls, x.grid)


def serial_block(
    a: Author,
    weights: Weights,
    path: str,
    scale: int,
    x: Tokens,
    form: GraphForm,
    num_heads: int,
    both_read: bool,
) -> Tokens:
    """Return the block `path` ("serial_blocks1.0") applied to the tokens of `scale`.

    `both_read`: whether image and class token of the result are both needed.
    """
    with a.scope(path):
        x = conv_position(a, weights, f"cpe{scale}", x, form)
        y = norm_attend(a, weights, path, scale, x, form, num_heads)
        return norm_ffn(a, weights, path, "mlp", add_tokens(a, x, y), form, both_read)


def parallel_block(
    a: Author,
    weights: Weights,
    path: str,
    scales: Sequence[Tokens],
    form: GraphForm,
    num_heads: int,
    both_read: bool,
    exchange_scales: bool,
) -> list[Tokens]:
    """Return the block `path` ("parallel_blocks.0") applied to scales 2, 3, 4.

    `both_read`: as in a serial block.
    """
    with a.scope(path):
        encoded, attended = [], []
        for s, x in zip(PARALLEL_SCALES, scales, strict=True):
            with a.scope(f"scale{s}"):
                x = conv_position(a, weights, f"cpe{s}", x, form)
                encoded.append(x)
                attended.append(norm_attend(a, weights, path, s, x, form, num_heads, f"{s}"))
        if exchange_scales:
            joined = exchange(a, encoded, attended, form)
        else:
            joined = [add_tokens(a, x, y) for x, y in zip(encoded, attended, strict=True)]
        return [
            norm_ffn(a, weights, path, "mlp2", x, form, both_read, f"{s}")
            for s, x in zip(PARALLEL_SCALES, joined, strict=True)
        ]


def norm_attend(
    a: Author,
    weights: Weights,
    path: str,
    scale: int,
    x: Tokens,
    form: GraphForm,
    num_heads: int,
    suffix: str = "",
) -> Tokens:
    """Return ConvAtt(LN(X)) of the block `path`; its weights' names end in `suffix`."""
    attention = f"{path}.factoratt_crpe{suffix}"
    norm = read_norm(weights, f"{path}.norm1{suffix}")
    products = read_products(weights, attention, form)
    norm, products = fold_norm(norm, products, form.fold_norm)
    normed = Tokens(
        a.layer_norm(x.image, norm.gamma, norm.beta, LAYER_NORM_EPS, "norm1"),
        a.layer_norm(x.cls, norm.gamma, norm.beta, LAYER_NORM_EPS, "norm1_cls"),
        x.grid,
    )
    return conv_attention(
        a, weights, attention, normed, norm, products, f"crpe{scale}", form, num_heads
    )


def norm_ffn(
    a: Author,
    weights: Weights,
    path: str,
    mlp: str,
    x: Tokens,
    form: GraphForm,
    both_read: bool,
    suffix: str = "",
) -> Tokens:
    """Return X + FFN(LN(X)) of the block `path`: linear, GELU, linear.

    `mlp` is what the block calls its FFN. The norm's name ends in `suffix`: parallel blocks share
    one FFN between three norms, and to fold those takes a copy of its first layer each
    (`GraphForm.fold_shared_to`).
    `both_read`: somebody needs the image's rows and somebody the class token.
    """
    norm = read_norm(weights, f"{path}.norm2{suffix}")
    fc1, fc2 = (read_linear(weights, f"{path}.{mlp}.{layer}", form) for layer in ("fc1", "fc2"))
    fold = None if suffix and x.grid.channels > form.fold_shared_to else form.fold_norm
    norm, (fc1,) = fold_norm(norm, (fc1,), fold)
    fc1_key = f"fc1{suffix}" if fold else "fc1"

    def compute(tokens: Value, part: str, name: str) -> Value:
        end = f"{suffix}{part}"
        hidden = a.layer_norm(tokens, norm.gamma, norm.beta, LAYER_NORM_EPS, f"norm2{end}")
        with a.scope("mlp"):
            hidden = a.linear(hidden, fc1, f"fc1{end}", key=a.path(fc1_key))
            hidden = a.gelu(hidden, f"act{end}")
            hidden = a.linear(hidden, fc2, f"fc2{end}", key=a.path("fc2"))
        return a.add(tokens, hidden, name=name)

    channels, count = x.grid.channels, x.grid.num_tokens
    if both_read and count <= form.join_ffn_to * channels:
        joined = rows(a, join_tokens(a, x, f"tokens{suffix}"), channels)
        joined = compute(joined, "", f"joined{suffix}")
        return part_tokens(a, joined, x.grid, f"image{suffix}", f"cls{suffix}")
    image = compute(x.image, "", f"image{suffix}")
    return Tokens(image, compute(x.cls, "_cls", f"cls{suffix}"), x.grid)


def read_norm(weights: Weights, path: str) -> Norm:
    """Return the affine part of the LayerNorm that `path` leads to."""
    return Norm(weights[f"{path}.weight"], weights[f"{path}.bias"])


def add_tokens(a: Author, x: Tokens, y: Tokens) -> Tokens:
    """Return the residual sum of two states of one scale."""
    return Tokens(
        a.add(x.image, y.image, name="attended"),
        a.add(x.cls, y.cls, name="attended_cls"),
        x.grid,
    )


def exchange(
    a: Author, scales: Sequence[Tokens], attended: Sequence[Tokens], form: GraphForm
) -> list[Tokens]:
    """Feature interpolation: add to every scale the attention of all, resampled to its size.

    The class tokens have no size: one sum serves all three scales.
    """
    with a.scope("co_scale"):
        cls = a.add(*(y.cls for y in attended), name="cls")
        maps = [_resample_source(a, y, form) for y in attended]
        joined = []
        for s, x in enumerate(scales):
            others = [
                _resample(a, maps[t], x.grid, form, f"resize{t + 2}_to_{s + 2}")
                for t in range(len(scales))
                if t != s
            ]
            image = a.add(x.image, attended[s].image, *others, name=f"image{s + 2}")
            joined.append(Tokens(image, a.add(x.cls, cls, name=f"cls{s + 2}"), x.grid))
        return joined


def _resample_source(a: Author, x: Tokens, form: GraphForm) -> Value:
    if form.resize_layout == "nchw":
        return to_map(a, x.image, x.grid)
    return a.reshape(x.image, x.grid.map_shape, "map")


def _resample(a: Author, source: Value, grid: Grid, form: GraphForm, name: str) -> Value:
    """Return a map, in the form's layout, as image rows of another grid."""
    computed = form.resize_sizes == "computed"
    if form.resize_layout == "nchw":
        resized = a.resize(source, grid.size, (2, 3), name, computed)
        return from_map(a, resized, grid.channels)
    return rows(a, a.resize(source, grid.size, (1, 2), name, computed), grid.channels)
