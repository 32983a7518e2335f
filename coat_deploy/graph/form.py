"""Forms: how the one network is written for a runtime."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from coat_deploy.errors import UsageError, unknown_name

FORM_NAMES = ("authored", "traced")
"""Written by us, or by PyTorch's exporter."""

TRACED_PRECISIONS = ("fp32", "bf16")
"""What a runtime can be asked to compute a traced graph in. int8 has to be written into a graph."""


@dataclass(frozen=True)
class GraphForm:
    """A frozen choice of how conv-attention and the blocks around it are written.

    fold_context_ratio: with N tokens and C channels, where N >= ratio * C the context is taken
        as `(S X) Wv^T + bv` instead of `S V`. The rows of S sum to 1, so both are equal; the
        first needs no V of the class token, but one C x C x C product more.
    fold_norm: the affine part of a LayerNorm moves into the layers that read it, which then need
        no bias (`folds.fold_norm`). Pays where a bias is a pass of its own.
    resize_layout: where channels stand when parallel blocks resample: "nhwc" or "nchw". Not
        "nchw" for onnxruntime (tried with 1.32): its optimiser moves the Transpose before a
        Resize behind it, permutes the two sizes as if they were four, and refuses the graph.
    """

    fold_context_ratio: float = 2.0
    fold_norm: bool = False
    resize_layout: Literal["nhwc", "nchw"] = "nhwc"


FORMS: Mapping[str, GraphForm] = {
    "onnxruntime": GraphForm(fold_norm=True),
    "openvino": GraphForm(resize_layout="nchw"),
}
"""The authored form of each target that takes ONNX."""


def get_form(target: str) -> GraphForm:
    """Return the form of a target. Raises UsageError where it takes no ONNX file."""
    if target not in FORMS:
        raise UsageError(unknown_name("target for an ONNX graph", target, FORMS))
    return FORMS[target]
