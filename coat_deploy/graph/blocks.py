"""Serial and parallel blocks in ONNX operators: `network/blocks.py`, restated.

A block's outputs are named `<block>.image` (rows) and `<block>.cls`, or with the scale's number
behind them in a parallel block: the names by which blocks are compared with the network's.
"""

from collections.abc import Sequence

from coat_deploy.graph.attention import Weights, conv_attention
from coat_deploy.graph.author import Author, Value
from coat_deploy.graph.folds import fold_position
from coat_deploy.graph.form import GraphForm
from coat_deploy.graph.tokens import Grid, Tokens, from_map, rows, to_map

LAYER_NORM_EPS = 1e-6
PARALLEL_SCALES = (2, 3, 4)


def conv_position(a: Author, weights: Weights, path: str, x: Tokens) -> Tokens:
    """Return tokens with CPE, X + DWConv(X), as one convolution; unchanged where it is left out.

    `path` leads to the scale's shared encoding, "cpe1" to "cpe4".
    """
    if f"{path}.proj.weight" not in weights:
        return x
    weight = fold_position(weights[f"{path}.proj.weight"])
    with a.scope("cpe"):
        feature_map = to_map(a, x.image, x.grid)
        encoded = a.depthwise(feature_map, weight, weights[f"{path}.proj.bias"], "conv", key=path)
        return Tokens(from_map(a, encoded, x.grid.channels), x.cls, x.grid)


def norm_tokens(a: Author, weights: Weights, path: str, x: Tokens, name: str) -> Tokens:
    """Return the LayerNorm of image rows and class token."""
    affine = weights[f"{path}.weight"], weights[f"{path}.bias"]
    return Tokens(
        a.layer_norm(x.image, *affine, LAYER_NORM_EPS, name),
        a.layer_norm(x.cls, *affine, LAYER_NORM_EPS, f"{name}_cls"),
        x.grid,
    )


def ffn(a: Author, weights: Weights, path: str, x: Value, suffix: str = "") -> Value:
    """Return linear, GELU, linear of rows (R, C)."""
    fc1, fc2 = (
        (weights[f"{path}.{layer}.weight"], weights[f"{path}.{layer}.bias"])
        for layer in ("fc1", "fc2")
    )
    with a.scope("mlp"):
        hidden = a.linear(x, *fc1, f"fc1{suffix}", key=a.path("fc1"))
        hidden = a.gelu(hidden, f"act{suffix}")
        return a.linear(hidden, *fc2, f"fc2{suffix}", key=a.path("fc2"))


def serial_block(
    a: Author,
    weights: Weights,
    path: str,
    scale: int,
    x: Tokens,
    form: GraphForm,
    num_heads: int,
) -> Tokens:
    """Return the block `path` ("serial_blocks1.0") applied to the tokens of `scale`."""
    with a.scope(path):
        x = conv_position(a, weights, f"cpe{scale}", x)
        normed = norm_tokens(a, weights, f"{path}.norm1", x, "norm1")
        attention = f"{path}.factoratt_crpe"
        y = conv_attention(a, weights, attention, normed, f"crpe{scale}", form, num_heads)
        image = a.add(x.image, y.image, name="attended")
        cls = a.add(x.cls, y.cls, name="attended_cls")
        normed = norm_tokens(a, weights, f"{path}.norm2", Tokens(image, cls, x.grid), "norm2")
        image_ffn = ffn(a, weights, f"{path}.mlp", normed.image)
        cls_ffn = ffn(a, weights, f"{path}.mlp", normed.cls, "_cls")
        return Tokens(
            a.add(image, image_ffn, name="image"), a.add(cls, cls_ffn, name="cls"), x.grid
        )


def parallel_block(
    a: Author,
    weights: Weights,
    path: str,
    scales: Sequence[Tokens],
    form: GraphForm,
    num_heads: int,
    exchange_scales: bool,
) -> list[Tokens]:
    """Return the block `path` ("parallel_blocks.0") applied to scales 2, 3, 4."""
    with a.scope(path):
        encoded, attended = [], []
        for s, x in zip(PARALLEL_SCALES, scales, strict=True):
            with a.scope(f"scale{s}"):
                x = conv_position(a, weights, f"cpe{s}", x)
                normed = norm_tokens(a, weights, f"{path}.norm1{s}", x, "norm1")
                attention = f"{path}.factoratt_crpe{s}"
                y = conv_attention(a, weights, attention, normed, f"crpe{s}", form, num_heads)
                encoded.append(x)
                attended.append(y)
        if exchange_scales:
            joined = exchange(a, encoded, attended, form)
        else:
            joined = [add_tokens(a, x, y) for x, y in zip(encoded, attended, strict=True)]
        normed_scales = [
            norm_tokens(a, weights, f"{path}.norm2{s}", x, f"norm2{s}")
            for s, x in zip(PARALLEL_SCALES, joined, strict=True)
        ]
        outputs = shared_ffn(a, weights, f"{path}.mlp2", normed_scales)
        return [
            Tokens(
                a.add(x.image, y.image, name=f"image{s}"),
                a.add(x.cls, y.cls, name=f"cls{s}"),
                x.grid,
            )
            for s, x, y in zip(PARALLEL_SCALES, joined, outputs, strict=True)
        ]


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
    if form.resize_layout == "nchw":
        return from_map(a, a.resize(source, grid.size, (2, 3), name), grid.channels)
    return rows(a, a.resize(source, grid.size, (1, 2), name), grid.channels)


def shared_ffn(a: Author, weights: Weights, path: str, scales: Sequence[Tokens]) -> list[Tokens]:
    """Return the shared FFN of each scale's tokens, one after another."""
    return [
        Tokens(
            ffn(a, weights, path, x.image, f"{s}"), ffn(a, weights, path, x.cls, f"{s}_cls"), x.grid
        )
        for s, x in zip(PARALLEL_SCALES, scales, strict=True)
    ]
