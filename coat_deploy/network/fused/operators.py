"""The fused parts as operators of PyTorch, which `torch.compile`, export and AOTInductor take.

On a GPU they are Triton's kernels, which a compiler sees and packs into what it makes; elsewhere
plain PyTorch. There is no backward pass.
"""

import torch
from torch import Tensor

from coat_deploy.network.fused import plain


@torch.library.triton_op("coat::conv_attention", mutates_args=())
def conv_attention(
    qkv: Tensor,
    taps: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    windows: list[int],
    height: int,
    width: int,
) -> Tensor:
    """Return conv-attention (B, N, C) of Q, K, V side by side; see `plain.conv_attention`."""
    size = (height, width)
    if not qkv.is_cuda:
        return plain.conv_attention(qkv, taps, bias, num_heads, windows, size)
    from coat_deploy.network.fused import launches

    return launches.conv_attention(
        qkv.contiguous(), taps, bias, num_heads, windows, size, torch.library.wrap_triton
    )


@torch.library.triton_op("coat::encode_position", mutates_args=())
def encode_position(x: Tensor, taps: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    """Return X + DWConv(X) of tokens (B, N, C); see `plain.encode_position`."""
    size = (height, width)
    if not x.is_cuda:
        return plain.encode_position(x, taps, bias, size)
    from coat_deploy.network.fused import launches

    return launches.encode_position(x.contiguous(), taps, bias, size, torch.library.wrap_triton)


@torch.library.triton_op("coat::layer_norm", mutates_args=())
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return LayerNorm of tokens (..., C)."""
    if not x.is_cuda:
        return torch.nn.functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    from coat_deploy.network.fused import launches

    return launches.layer_norm(x.contiguous(), weight, bias, eps, torch.library.wrap_triton)


@torch.library.triton_op("coat::feed_forward", mutates_args=())
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
    """Return X + FFN(LayerNorm(X)) of tokens (..., C); see `plain.feed_forward`."""
    arguments = (norm_weight, norm_bias, weight1, bias1, weight2, bias2, eps)
    if not x.is_cuda:
        return plain.feed_forward(x, *arguments)
    from coat_deploy.network.fused import launches

    return launches.feed_forward(x.contiguous(), *arguments, torch.library.wrap_triton)


@conv_attention.register_fake
def _(
    qkv: Tensor,
    taps: Tensor | None,
    bias: Tensor | None,
    num_heads: int,
    windows: list[int],
    height: int,
    width: int,
) -> Tensor:
    return qkv.new_empty((*qkv.shape[:2], qkv.shape[2] // 3))


@encode_position.register_fake
def _(x: Tensor, taps: Tensor, bias: Tensor, height: int, width: int) -> Tensor:
    return x.new_empty(x.shape)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    return x.new_empty(x.shape)


@feed_forward.register_fake
def _(
    x: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
) -> Tensor:
    return x.new_empty(x.shape)
