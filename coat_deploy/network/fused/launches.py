"""The kernels put to work: grids, blocks and what lies between two kernels.

Sizes may be symbols of a graph that is being captured: nothing here asks for their values, but for
that of the map's width, of which columns follow.

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

BLOCK, CONTEXT_WARPS, CONTEXT_STAGES = 64, 4, 2
"""Tokens of the context that are in registers at once."""
ATTENDED, ATTEND_WARPS = 128, 4
"""Tokens that a program attends; half as many of four bytes, for want of registers."""
WINDOW_LANES, NARROW, EACH = 16, 4, 8
"""Channels that a program slides windows over; of those a thread takes `NARROW` neighbours, and
`EACH` results of a row in all."""
MOST_ACROSS = 64
"""Columns that windows slide over together."""
WINDOW_PROGRAMS, LEAST_ROWS = 1056, 4
"""Programs that windows are shared by at least, and rows of a tile where that allows as many."""
TILE, POSITION_LANES, POSITION_WARPS = 8, 64, 4
"""Side of the square of pixels whose position a program encodes, and how many channels of it."""
NORMED = 4096
"""Numbers that a program of LayerNorm takes."""
ROWS, HIDDEN_BLOCK, FFN_WARPS, FFN_STAGES = 64, 64, 4, 3
"""Tokens of the FFN that a program takes, and their hidden channels that it makes at once."""
WIDE_ROWS, WIDE_HIDDEN_BLOCK, WIDE_FFN_WARPS, WIDE_FFN_STAGES = 64, 32, 8, 2
"""The same of four bytes: more weights would not fit a multiprocessor's memory."""
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
    """Return conv-attention (B, N, C) by three kernels; arguments as of `plain.conv_attention`."""
    batch, tokens, wide = qkv.shape
    channels = wide // 3
    head = channels // num_heads
    precision = _precision(qkv.dtype)
    contexts, statistics, splits = context(qkv, num_heads, precision, wrap)
    out = qkv.new_empty((batch, tokens, channels))
    if taps is not None and bias is not None:
        slide_windows(qkv, taps, bias, windows, size, out, wrap)
    together = plan.heads_together(head, num_heads)
    groups = -(-num_heads // together)
    attended = ATTENDED // 2 if qkv.dtype == torch.float32 else ATTENDED
    wrap(kernels.attend_kernel)[(groups, (tokens + attended - 1) // attended, batch)](
        qkv, contexts, statistics, out, tokens, splits, head**-0.5,
        CHANNELS=channels, HEAD=head, GROUP_HEADS=together, LANES=plan.lanes(together, head),
        BLOCK=attended, ENCODE=taps is not None, PRECISION=precision, num_warps=ATTEND_WARPS,
    )  # fmt: skip
    return out


def slide_windows(
    qkv: Tensor,
    taps: Tensor,
    bias: Tensor,
    windows: Sequence[int],
    size: tuple[int, int],
    out: Tensor,
    wrap: Wrap,
) -> None:
    """Write DWConv(V) to the image tokens of `out` (B, N, C); arguments as of `conv_attention`."""
    batch, tokens, channels = out.shape
    height, width = size
    lanes = min(WINDOW_LANES, plan.lanes(1, channels))
    kinds = plan.window_blocks(windows, channels // len(windows), lanes)
    blocks = sum(count for _, count in kinds)
    kinds += [(1, 0)] * (plan.NUM_KINDS - len(kinds))
    across = min(MOST_ACROSS, max(16, 1 << (width - 1).bit_length()))
    columns = (width + across - 1) // across
    chunks, rows = split_rows(batch * blocks * columns, height)
    wrap(kernels.window_kernel)[(blocks, chunks * columns, batch)](
        qkv, taps, bias, out, tokens, height, width, columns, rows,
        CHANNELS=channels, LANES=lanes, NARROW=NARROW, ACROSS=across,
        BLOCKS_A=kinds[0][1], BLOCKS_B=kinds[1][1],
        RADIUS_A=kinds[0][0] // 2, RADIUS_B=kinds[1][0] // 2, RADIUS_C=kinds[2][0] // 2,
        SIDE=math.isqrt(taps.shape[0]), num_warps=max(1, across * lanes // (32 * EACH)),
    )  # fmt: skip


def split_rows(programs: int, height: int) -> tuple[int, int]:
    """Return into how many tiles a column of windows is cut, and the rows of one.

    Every cut costs the rows above and below it once more. The last tiles may be empty.
    """
    most = (height + LEAST_ROWS - 1) // LEAST_ROWS
    wanted = (WINDOW_PROGRAMS + programs - 1) // programs
    chunks = torch.sym_min(wanted, most)
    return chunks, (height + chunks - 1) // chunks


def context(qkv: Tensor, num_heads: int, precision: str, wrap: Wrap) -> tuple[Tensor, Tensor, int]:
    """Return contexts (B, splits, C, c) and statistics (B, splits, 2, C), flat, and the splits."""
    batch, tokens, wide = qkv.shape
    channels = wide // 3
    head = channels // num_heads
    together = plan.heads_together(head, num_heads)
    groups = -(-num_heads // together)
    splits, chunk = split_tokens(batch * groups, tokens)
    # Flat: strides of a dimension that may be 1 would bind a captured graph to its number.
    contexts = qkv.new_empty(batch * splits * channels * head, dtype=torch.float32)
    statistics = qkv.new_empty(batch * splits * 2 * channels, dtype=torch.float32)
    wrap(kernels.context_kernel)[(groups, splits, batch)](
        qkv, contexts, statistics, tokens, chunk, splits,
        CHANNELS=channels, HEAD=head, GROUP_HEADS=together, LANES=plan.lanes(together, head),
        BLOCK=BLOCK, PRECISION=precision, num_warps=CONTEXT_WARPS, num_stages=CONTEXT_STAGES,
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
    lanes = min(POSITION_LANES, plan.lanes(1, channels))
    groups = (channels + lanes - 1) // lanes
    out = x.new_empty(x.shape)
    wrap(kernels.position_kernel)[(groups, (height + TILE - 1) // TILE * columns, batch)](
        x, taps, bias, out, tokens, height, width, columns,
        CHANNELS=channels, LANES=lanes, TILE=TILE, SIDE=math.isqrt(taps.shape[0]),
        num_warps=POSITION_WARPS,
    )  # fmt: skip
    return out


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, wrap: Wrap) -> Tensor:
    """Return LayerNorm of tokens (..., C), as PyTorch's computes it, rounded once."""
    channels = x.shape[-1]
    num_rows = x.numel() // channels
    lanes = 1 << (channels - 1).bit_length()
    rows = max(1, NORMED // lanes)
    out = x.new_empty(x.shape)
    wrap(kernels.norm_kernel)[((num_rows + rows - 1) // rows,)](
        x, weight, bias, out, num_rows, eps,
        CHANNELS=channels, LANES=lanes, ROWS=rows, num_warps=4,
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
    rows, block, warps, stages = ROWS, HIDDEN_BLOCK, FFN_WARPS, FFN_STAGES
    if weight1.dtype == torch.float32:
        rows, block = WIDE_ROWS, WIDE_HIDDEN_BLOCK
        warps, stages = WIDE_FFN_WARPS, WIDE_FFN_STAGES
    hidden = weight1.shape[0]
    out = x.new_empty(x.shape)
    wrap(kernels.feed_forward_kernel)[((num_rows + rows - 1) // rows,)](
        x, norm_weight, norm_bias, weight1, bias1, weight2, bias2, out, num_rows, eps,
        CHANNELS=channels, HIDDEN=hidden, ROWS=rows, BLOCK=math.gcd(hidden, block),
        PRECISION=_precision(weight1.dtype), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _precision(dtype: torch.dtype) -> str:
    """Return how matrix units multiply: float32 as three products of its halves, nearly exact."""
    return "tf32x3" if dtype == torch.float32 else "tf32"
