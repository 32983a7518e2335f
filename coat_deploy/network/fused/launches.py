"""The kernels put to work: grids, blocks and what lies between two kernels.

Sizes may be symbols of a graph that is being captured: nothing here asks for their values.

Letters: B images, N = 1 + H*W tokens (class token first), C channels, h heads, c = C / h.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from coat_deploy.network.fused import kernels, plan

Wrap = Callable[[Any], Any]
"""What makes a kernel part of a captured graph; for one that is interpreted, nothing."""

BLOCK = 64
"""Tokens of the context that are in registers at once."""
TILE = 8
"""Side of the square of pixels that a program attends."""
ROWS, HIDDEN_BLOCK = 128, 64
"""Tokens of the FFN that a program takes, and their hidden channels that it makes at once."""
PROGRAMS = 1056
"""Programs that keep a large GPU busy: eight for each of 132 multiprocessors."""
LEAST_CHUNK, MOST_SPLITS = 2 * BLOCK, 16
"""Fewer tokens a program, or more chunks to join, cost more than the programs gain."""


def conv_attention(
    qkv: Tensor,
    taps: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    windows: Sequence[int],
    size: tuple[int, int],
    wrap: Wrap,
) -> Tensor:
    """Return conv-attention (B, N, C) by two kernels; arguments as of `plain.conv_attention`."""
    batch, tokens, wide = qkv.shape
    channels = wide // 3
    head = channels // num_heads
    precision = _precision(qkv.dtype)
    contexts, statistics, splits = context(qkv, num_heads, precision, wrap)

    kinds = plan.window_kinds(windows) if taps is not None else [(1, num_heads)]
    together = plan.heads_together(head, [heads for _, heads in kinds])
    groups = plan.num_groups(together, [heads for _, heads in kinds])
    kinds += [(1, 0)] * (plan.NUM_KINDS - len(kinds))
    height, width = size
    columns = (width + TILE - 1) // TILE
    out = qkv.new_empty((batch, tokens, channels))
    wrap(kernels.attend_kernel)[(groups, (height + TILE - 1) // TILE * columns, batch)](
        qkv, contexts, statistics, qkv if taps is None else taps, qkv if bias is None else bias,
        out, tokens, splits, height, width, columns, head**-0.5,
        CHANNELS=channels, HEAD=head, GROUP_HEADS=together, LANES=plan.lanes(together, head),
        TILE=TILE, ENCODE=taps is not None,
        HEADS_A=kinds[0][1], HEADS_B=kinds[1][1], HEADS_C=kinds[2][1],
        RADIUS_A=kinds[0][0] // 2, RADIUS_B=kinds[1][0] // 2, RADIUS_C=kinds[2][0] // 2,
        SIDE=max(window for window, _ in kinds), PRECISION=precision,
        num_warps=4 if plan.lanes(together, head) < plan.MOST_LANES else 8,
    )  # fmt: skip
    return out


def context(qkv: Tensor, num_heads: int, precision: str, wrap: Wrap) -> tuple[Tensor, Tensor, int]:
    """Return contexts (B, splits, C, c) and statistics (B, splits, 2, C), flat, and the splits."""
    batch, tokens, wide = qkv.shape
    channels = wide // 3
    head = channels // num_heads
    together = plan.heads_together(head, [num_heads])
    groups = plan.num_groups(together, [num_heads])
    splits, chunk = split_tokens(batch * groups, tokens)
    # Flat: strides of a dimension that may be 1 would bind a captured graph to its number.
    contexts = qkv.new_empty(batch * splits * channels * head, dtype=torch.float32)
    statistics = qkv.new_empty(batch * splits * 2 * channels, dtype=torch.float32)
    wrap(kernels.context_kernel)[(groups, splits, batch)](
        qkv, contexts, statistics, tokens, chunk, splits,
        CHANNELS=channels, HEAD=head, GROUP_HEADS=together, LANES=plan.lanes(together, head),
        BLOCK=BLOCK, PRECISION=precision, num_warps=4,
    )  # fmt: skip
    return contexts, statistics, splits


def split_tokens(programs: int, tokens: int) -> tuple[int, int]:
    """Return in how many chunks an image's tokens are summed, and the tokens of one.

    Few images leave a GPU idle unless several programs share each. The last chunks may be empty.
    """
    worth_it = (tokens + LEAST_CHUNK - 1) // LEAST_CHUNK
    wanted = (PROGRAMS + programs - 1) // programs
    splits = torch.sym_min(torch.sym_min(wanted, worth_it), MOST_SPLITS)
    blocks = (tokens + splits * BLOCK - 1) // (splits * BLOCK)
    return splits, blocks * BLOCK


def encode_position(
    x: Tensor, taps: Tensor, bias: Tensor, size: tuple[int, int], wrap: Wrap
) -> Tensor:
    """Return tokens with their position encoded; arguments as of `plain.encode_position`."""
    batch, tokens, channels = x.shape
    height, width = size
    columns = (width + TILE - 1) // TILE
    lanes = min(plan.MOST_LANES, plan.lanes(1, channels))
    groups = (channels + lanes - 1) // lanes
    out = x.new_empty(x.shape)
    wrap(kernels.position_kernel)[(groups, (height + TILE - 1) // TILE * columns, batch)](
        x, taps, bias, out, tokens, height, width, columns,
        CHANNELS=channels, LANES=lanes, TILE=TILE, SIDE=math.isqrt(taps.shape[0]), num_warps=4,
    )  # fmt: skip
    return out


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    wrap: Wrap,
) -> Tensor:
    """Return tokens (..., C) and their FFN by one kernel; arguments as of `plain.feed_forward`."""
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    # Weights of four bytes would not fit a multiprocessor's memory.
    wide = weight1.dtype == torch.float32
    rows, block = (ROWS // 2, HIDDEN_BLOCK // 2) if wide else (ROWS, HIDDEN_BLOCK)
    hidden = weight1.shape[0]
    out = x.new_empty(x.shape)
    wrap(kernels.feed_forward_kernel)[((num_rows + rows - 1) // rows,)](
        x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, out, num_rows, eps,
        CHANNELS=channels, HIDDEN=hidden, ROWS=rows, BLOCK=math.gcd(hidden, block),
        PRECISION=_precision(weight1.dtype), num_warps=8, num_stages=2 if wide else 3,
    )  # fmt: skip
    return out


def _precision(dtype: torch.dtype) -> str:
    """Return how matrix units multiply: float32 as three products of its halves, nearly exact."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
