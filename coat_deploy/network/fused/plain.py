"""What the kernels compute, in PyTorch, for any device and as their yardstick.

Letters: B images, N = 1 + H*W tokens (class token first), C channels, h heads, c = C / h.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coat_deploy.network.tokens import map_to_tokens, tokens_to_map


def conv_attention(
    qkv: Tensor,
    taps: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    windows: Sequence[int],
    size: tuple[int, int],
) -> Tensor:
    """Return conv-attention (B, N, C) of Q, K, V side by side, (B, N, 3C), summed in float32.

    taps: the depthwise windows of CRPE, (S * S, C) row by row, narrow ones among zeros; None
    leaves it out, and bias (C,). windows: each head's, S at most; here the zeros say as much.
    """
    batch, tokens, wide = qkv.shape
    channels = wide // 3
    head = channels // num_heads
    exact = torch.promote_types(qkv.dtype, torch.float32)
    heads = qkv.to(exact).reshape(batch, tokens, 3, num_heads, head).permute(2, 0, 3, 1, 4)
    q, k, v = heads.unbind(0)  # (B, h, N, c) each
    attended = head**-0.5 * (q @ (k.softmax(dim=-2).transpose(-1, -2) @ v))
    y = attended.transpose(1, 2).reshape(batch, tokens, channels)
    if taps is not None and bias is not None:
        q, _, v = qkv.to(exact).chunk(3, dim=-1)
        y = y + nn.functional.pad(q[:, 1:] * _convolved(v, taps, bias, size), (0, 0, 1, 0))
    return y.to(qkv.dtype)


def encode_position(x: Tensor, taps: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Return X + DWConv(X) of tokens (B, N, C), summed in float32; the class token as it is."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    encoded = nn.functional.pad(_convolved(exact, taps, bias, size), (0, 0, 1, 0))
    return (exact + encoded).to(x.dtype)


def _convolved(x: Tensor, taps: Tensor, bias: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the depthwise convolution (B, N - 1, C) of the image tokens of x (B, N, C)."""
    channels = x.shape[2]
    side = math.isqrt(taps.shape[0])
    weight = taps.to(x.dtype).t().reshape(channels, 1, side, side)
    encoded = nn.functional.conv2d(
        tokens_to_map(x[:, 1:], size), weight, bias.to(x.dtype), padding=side // 2, groups=channels
    )
    return map_to_tokens(encoded)


def feed_forward(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> Tensor:
    """Return X + FFN(LayerNorm(X)) of tokens (..., C).

    Shapes: weight1 (HIDDEN, C), weight2 (C, HIDDEN), biases as wide as what they are added to.
    """
    normed = nn.functional.layer_norm(x, (x.shape[-1],), norm_weight, norm_bias, eps)
    hidden = nn.functional.gelu(nn.functional.linear(normed, weight1, bias1))
    return x + nn.functional.linear(hidden, weight2, bias2)
