"""Serial and parallel blocks in ONNX operators: `network/blocks.py`, restated.

A block's outputs are named `<block>.image` (rows) and `<block>.cls`, or with the scale's number
behind them in a parallel block: the names by which blocks are compared with the network's.
"""

from collections.abc import Sequence

from coat_deploy.graph.attention import Weights, conv_attention, read_products
from coat_deploy.graph.author import Author, Layer, Value
from coat_deploy.graph.folds import Norm, fold_norm, fold_position
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


def norm_tokens(
    a: Author,
    weights: Weights,
    path: str,
    x: Tokens,
    name: str,
    layers: Sequence[Layer],
    fold: bool,
) -> tuple[Tokens, list[Layer]]:
    """Return the LayerNorm of image rows and class token, and the layers that read it.

    With `fold` those are not the ones given: they have taken the norm's affine part over.
    """
    norm, read = Norm(weights[f"{path}.weight"], weights[f"{path}.bias"]), list(layers)
    if fold:
        norm, read = fold_norm(norm, read)
    image = a.layer_norm(x.image, norm.gamma, norm.beta, LAYER_NORM_EPS, name)
    cls = a.layer_norm(x.cls, norm.gamma, norm.beta, LAYER_NORM_EPS, f"{name}_cls")
    return Tokens(image, cls, x.grid), read


def read_ffn(weights: Weights, path: str, form: GraphForm) -> tuple[Layer, Layer]:
    """Return the two layers of the FFN that `path` leads to."""
    fc1, fc2 = (
        form.linear(weights[f"{path}.{layer}.weight"], weights[f"{path}.{layer}.bias"])
        for layer in ("fc1", "fc2")
    )
    return fc1, fc2


def ffn(a: Author, x: Value, fc1: Layer, fc2: Layer, suffix: str = "") -> Value:
    """Return linear, GELU, linear of rows (R, C)."""
    with a.scope("mlp"):
        hidden = a.linear(x, fc1, f"fc1{suffix}", key=a.path("fc1"))
        hidden = a.gelu(hidden, f"act{suffix}")
        return a.linear(hidden, fc2, f"fc2{suffix}", key=a.path("fc2"))


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
        attention = f"{path}.factoratt_crpe"
        products = read_products(weights, attention, form)
        normed, products = norm_tokens(
            a, weights, f"{path}.norm1", x, "norm1", products, form.fold_norm
        )
        y = conv_attention(a, weights, attention, normed, products, f"crpe{scale}", form, num_heads)
        x = add_tokens(a, x, y)
        fc1, fc2 = read_ffn(weights, f"{path}.mlp", form)
        normed, (fc1,) = norm_tokens(
            a, weights, f"{path}.norm2", x, "norm2", (fc1,), form.fold_norm
        )
        image = ffn(a, normed.image, fc1, fc2)
        cls = ffn(a, normed.cls, fc1, fc2, "_cls")
        return Tokens(a.add(x.image, image, name="image"), a.add(x.cls, cls, name="cls"), x.grid)


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
                attention = f"{path}.factoratt_crpe{s}"
                normed, products = norm_tokens(
                    a,
                    weights,
                    f"{path}.norm1{s}",
                    x,
                    "norm1",
                    read_products(weights, attention, form),
                    form.fold_norm,
                )
                y = conv_attention(
                    a, weights, attention, normed, products, f"crpe{s}", form, num_heads
                )
                encoded.append(x)
                attended.append(y)
        if exchange_scales:
            joined = exchange(a, encoded, attended, form)
        else:
            joined = [add_tokens(a, x, y) for x, y in zip(encoded, attended, strict=True)]
        # The FFN is shared and the norms are not: each would need a copy of it to fold into.
        ffn_layers = read_ffn(weights, f"{path}.mlp2", form)
        outputs = []
        for s, x in zip(PARALLEL_SCALES, joined, strict=True):
            normed, _ = norm_tokens(a, weights, f"{path}.norm2{s}", x, f"norm2{s}", (), False)
            image = ffn(a, normed.image, *ffn_layers, f"{s}")
            cls = ffn(a, normed.cls, *ffn_layers, f"{s}_cls")
            outputs.append(
                Tokens(
                    a.add(x.image, image, name=f"image{s}"),
                    a.add(x.cls, cls, name=f"cls{s}"),
                    x.grid,
                )
            )
        return outputs


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
