"""Forms: how the one network is written for a runtime."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.graph.folds import NormFold
from coat_deploy.graph.layer import Floats, Layer

FORM_NAMES = ("authored", "traced")
"""Written by us, or by PyTorch's exporter."""

TRACED_PRECISIONS = ("fp32", "tf32", "fp16", "bf16")
"""What a traced graph can be computed in, or lowered to. int8 has to be authored."""


Keys = Literal["transposed", "rows"]
Types = Literal["fp32", "fp16", "bf16"]


@dataclass(frozen=True)
class GraphForm:
    """A frozen choice of how conv-attention and the blocks around it are written.

    fold_context_ratio: with N tokens and C channels, where N >= ratio * C the context is taken
        as `(S X) Wv^T + bv` instead of `S V`. The rows of S sum to 1, so both are equal; the
        first needs no V of the class token, but one C x C x C product more.
    fold_proj_ratio: with N tokens and C channels, where N >= ratio * C, Q's product and the output
        projection are folded into the context. With `fold_norm` by "channel" only: there the
        biases come along for nothing.
    keys: how S, the softmax of K over the tokens, is taken. "transposed": along the rows of
        K^T = Wk X^T; "rows": down the columns of K = X Wk^T, and what reads it takes the transpose.
    fold_position: whether the sum in CPE, X + DWConv(X), is a 1 at the centre of its window. Not
        where it is computed in a low type: next to the 1, the window's numbers lose their digits.
    fold_norm: the affine part of a LayerNorm moves into the layers that read it: by their weights
        and biases ("bias"), or so that they need no bias ("channel"), which pays where a bias is
        a pass of its own (`folds`). None leaves it with the norm.
    fold_shared_to: where parallel blocks share an FFN between norms, these are folded up to so many
        channels: each takes a copy of the first layer, which gains little where it is large.
    int8_from: linear layers of at least so many inputs are computed in 8-bit integers, their
        inputs quantized by their range at run time; None leaves all in float32. Not with
        `fold_norm` by "channel".
    join_ffn_to: class and image tokens go through the FFN together, where the image's are at most
        so many times the channels: a product less, for a copy more. 0 keeps them apart.
    resize_layout: where channels stand when parallel blocks resample: "nhwc" or "nchw". Not
        "nchw" for onnxruntime (tried with 1.32): its optimiser moves the Transpose before a
        Resize behind it, permutes the two sizes as if they were four, and refuses the graph.
    resize_sizes: whether sizes to resample to stand there as constants. "computed" for TensorRT
        (tried with RTX 1.7): its parser refuses constant ones where the batch is open.
    types: what the graph's numbers are, but for islands of float32 (`precision`). A runtime that
        casts by itself takes a graph of float32.
    """

    fold_context_ratio: float = 2.0
    fold_proj_ratio: float = math.inf
    keys: Keys = "transposed"
    fold_position: bool = True
    fold_norm: NormFold | None = None
    fold_shared_to: int = 256
    int8_from: int | None = None
    join_ffn_to: float = 0.0
    resize_layout: Literal["nhwc", "nchw"] = "nhwc"
    resize_sizes: Literal["constant", "computed"] = "constant"
    types: Types = "fp32"

    def __post_init__(self) -> None:
        # The column that carries a folded bias would spoil the scale of its row.
        assert self.fold_norm != "channel" or self.int8_from is None

    def linear(self, weight: Floats, bias: Floats) -> Layer:
        """Return a layer as this form computes it."""
        return Layer(weight, bias, self.int8_from is not None and weight.shape[1] >= self.int8_from)


_TENSORRT_TYPES: Mapping[str, Types] = {
    "fp32": "fp32",
    "tf32": "fp32",  # chosen when the engine is built
    "fp16": "fp16",
    "bf16": "bf16",
}

_TENSORRT = {
    precision: GraphForm(
        keys="rows",
        fold_position=types == "fp32",
        fold_norm="bias",
        resize_layout="nchw",
        resize_sizes="computed",
        types=types,
    )
    for precision, types in _TENSORRT_TYPES.items()
}
"""Not measured: it has the fewest nodes."""

FORMS: Mapping[str, Mapping[str, GraphForm]] = {
    "onnxruntime": {
        "fp32": GraphForm(fold_norm="channel", fold_proj_ratio=4),
        # For CUDA, whose Resize knows channels first alone, and not measured.
        "fp16": GraphForm(
            keys="rows", fold_position=False, fold_norm="bias", resize_layout="nchw", types="fp16"
        ),
        "int8": GraphForm(int8_from=64),
    },
    "openvino": {
        "fp32": GraphForm(keys="rows", fold_norm="bias", resize_layout="nchw"),
        "bf16": GraphForm(
            keys="rows", fold_position=False, fold_norm="bias", join_ffn_to=8, resize_layout="nchw"
        ),
    },
    "tensorrt": _TENSORRT,
    "tensorrt-rtx": _TENSORRT,
}
"""The authored form of each target that takes ONNX, by precision."""


def get_form(target: str, precision: str) -> GraphForm:
    """Return the form of a target and precision. Raises UsageError where there is none."""
    if target not in FORMS:
        raise UsageError(unknown_name("target for an ONNX graph", target, FORMS))
    if precision not in FORMS[target]:
        raise UsageError(unknown_name(f"precision for {target}", precision, FORMS[target]))
    return FORMS[target][precision]
