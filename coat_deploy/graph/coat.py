"""The whole network as one ONNX graph: `network/coat.py`, restated.

Input `pixels` (B, 3, H, W) float32; output `logits` (B, K), or the maps `x1`..`x4`
(B, C_s, H_s, W_s). The batch is always dynamic; H and W are fixed or dynamic.
"""

from dataclasses import dataclass

import numpy as np
from onnx import ModelProto

from coat_deploy.errors import GraphError
from coat_deploy.graph.attention import Weights
from coat_deploy.graph.author import DEFAULT_OPSET, Author, Value
from coat_deploy.graph.blocks import LAYER_NORM_EPS, parallel_block, serial_block
from coat_deploy.graph.folds import fold_head
from coat_deploy.graph.form import GraphForm
from coat_deploy.graph.layer import Layer
from coat_deploy.graph.tokens import (
    NHWC_TO_NCHW,
    Grid,
    Tokens,
    dynamic_grid,
    fixed_grid,
    from_map,
    to_map,
)
from coat_deploy.network.variants import Variant, get_variant
from coat_deploy.runner import FEATURES, INPUT, LOGITS
from coat_deploy.spec import ModelSpec, Size, format_size

PATCH_NORM_EPS = 1e-5


@dataclass(frozen=True)
class GraphOptions:
    """What the graph accepts and returns, apart from how it is written.

    size: the fixed (H, W), or None for dynamic H and W. features: maps instead of logits.
    """

    size: Size | None
    features: bool = False
    opset: int = DEFAULT_OPSET


def author_graph(
    spec: ModelSpec, weights: Weights, form: GraphForm, options: GraphOptions
) -> ModelProto:
    """Return the graph of `spec` with `weights` (names and shapes of the checkpoint).

    Raises: GraphError for a size below the network's minimum, or a network the authored graphs
    do not cover (direct cross-layer attention); trace it instead.
    """
    variant = get_variant(spec.architecture)
    co_scale = spec.model_args.get("co_scale", "interpolation")
    if variant.parallel_depth and co_scale == "direct":
        raise GraphError(
            f"{spec.architecture}: direct cross-layer attention has no authored graph. "
            "Export it with --form traced."
        )
    check_size(variant, options.size)
    return _CoaT(variant, spec, weights, form, options).build(co_scale == "interpolation")


def check_size(variant: Variant, size: Size | None) -> None:
    """Raise GraphError for a fixed size below the network's minimum."""
    if size and min(size) < variant.min_side:
        raise GraphError(
            f"size {format_size(size)}: too small for {variant.name} "
            f"(both sides must be at least {variant.min_side}). Choose a larger size."
        )


class _CoaT:
    """Authors one graph; the methods follow the network's."""

    def __init__(
        self,
        variant: Variant,
        spec: ModelSpec,
        weights: Weights,
        form: GraphForm,
        options: GraphOptions,
    ) -> None:
        self.a = Author(options.opset)
        self.variant, self.spec, self.weights = variant, spec, weights
        self.form, self.options = form, options

    def build(self, exchange_scales: bool) -> ModelProto:
        scales = self.serial()
        if self.variant.parallel_depth:
            scales[1:] = self.parallel(scales[1:], exchange_scales)
        height, width = self.options.size or ("height", "width")
        inputs = {INPUT: ("batch", 3, height, width)}
        outputs = self.maps(scales) if self.options.features else self.logits(scales)
        return self.a.finish(self.spec.architecture, inputs, outputs)

    def serial(self) -> list[Tokens]:
        v, nominal = self.variant, self.options.size or self.spec.preprocess.input_size
        feature_map, scales = Value(INPUT), []
        stride = 1
        for s, channels in enumerate(v.channels, start=1):
            stride *= v.patch_size if s == 1 else 2
            # floor(floor(H / a) / b) = floor(H / ab): the strides multiply.
            x = self.embed(s, feature_map, (nominal[0] // stride, nominal[1] // stride), channels)
            for i in range(v.serial_depths[s - 1]):
                path = f"serial_blocks{s}.{i}"
                # A stage begins with a class token of its own.
                both_read = i + 1 < v.serial_depths[s - 1] or (v.parallel_depth > 0 and s > 1)
                x = serial_block(
                    self.a, self.weights, path, s, x, self.form, v.num_heads, both_read
                )
            if s < len(v.channels):
                with self.a.scope(f"patch_embed{s + 1}"):
                    feature_map = to_map(self.a, x.image, x.grid)
            scales.append(x)
        return scales

    def embed(self, s: int, feature_map: Value, nominal: Size, channels: int) -> Tokens:
        """Return the tokens of scale `s`: strided convolution, LayerNorm, class token."""
        a, path = self.a, f"patch_embed{s}"
        weights = {
            key: self.weights[f"{path}.{key}"]
            for key in ("proj.weight", "proj.bias", "norm.weight", "norm.bias")
        }
        with a.scope(path):
            x = a.patches(feature_map, weights["proj.weight"], weights["proj.bias"], "proj")
            grid = self.grid(x, nominal, channels)
            # Rows first: OpenVINO takes the norm of a map apart, and copies the map about.
            norm = weights["norm.weight"], weights["norm.bias"], PATCH_NORM_EPS
            image = a.layer_norm(from_map(a, x, channels), *norm, "image", key=a.path("norm"))
            cls = self.class_token(s, a.reshape(image, grid.map_shape, "map"), channels)
            return Tokens(image, cls, grid)

    def grid(self, feature_map: Value, nominal: Size, channels: int) -> Grid:
        if self.options.size:
            return fixed_grid(self.a, *nominal, channels)
        return dynamic_grid(self.a, feature_map, nominal[0] * nominal[1], channels)

    def class_token(self, s: int, image: Value, channels: int) -> Value:
        """Return the class token of scale `s` once an image, (B, C).

        Expanding it would need the batch size, so shape arithmetic. Adding it to one position
        of the map (B, H, W, C) times zero gives the same: a position that is not finite makes
        every logit NaN anyway, through the softmax over tokens.
        """
        a = self.a
        token = a.constant(f"cls_token{s}", self.weights[f"cls_token{s}"][0])
        corner = a.corner(image, (1, 2), "corner")
        zeros = a.mul(
            a.reshape(corner, a.integers(-1, channels), "corner_rows"),
            a.constant("zero", np.array(0.0)),
            "zeros",
        )
        return a.add(zeros, token, name="cls")

    def parallel(self, scales: list[Tokens], exchange_scales: bool) -> list[Tokens]:
        v = self.variant
        for i in range(v.parallel_depth):
            path = f"parallel_blocks.{i}"
            scales = parallel_block(
                self.a,
                self.weights,
                path,
                scales,
                self.form,
                v.num_heads,
                both_read=i + 1 < v.parallel_depth,
                exchange_scales=exchange_scales,
            )
        return scales

    def maps(self, scales: list[Tokens]) -> dict[str, tuple[int | str, ...]]:
        """Write the outputs x1..x4 and return their shapes."""
        a, shapes = self.a, {}
        for name, x in zip(FEATURES, scales, strict=True):
            feature_map = a.reshape(x.image, x.grid.map_shape, f"{name}.map")
            a.transpose(feature_map, NHWC_TO_NCHW, name)
            size = x.grid.fixed or (f"{name}_height", f"{name}_width")
            shapes[name] = ("batch", x.grid.channels, *size)
        return shapes

    def logits(self, scales: list[Tokens]) -> dict[str, tuple[int | str, ...]]:
        """Write the output `logits` and return its shape."""
        a, w = self.a, self.weights
        numbers = (2, 3, 4) if self.variant.parallel_depth else (4,)
        normed = [
            a.layer_norm(
                scales[s - 1].cls,
                w[f"norm{s}.weight"],
                w[f"norm{s}.bias"],
                LAYER_NORM_EPS,
                f"norm{s}",
            )
            for s in numbers
        ]
        identity = np.eye(self.variant.num_features), np.zeros(self.variant.num_features)
        weight, bias = (w["head.weight"], w["head.bias"]) if self.spec.num_classes else identity
        cls = normed[0]
        if len(normed) > 1:
            cls = a.concat(normed, 1, "cls")
            weight, bias = fold_head(
                w["aggregate.weight"].reshape(-1), w["aggregate.bias"], weight, bias
            )
        a.linear(cls, Layer(weight, bias), LOGITS, key="head")
        return {LOGITS: ("batch", len(bias))}
