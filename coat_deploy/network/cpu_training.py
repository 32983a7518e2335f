"""Training on a CPU: the parts of a step whose gradients PyTorch computes slowly, by hand.

The formulas stand in `coat.py`, `attention.py` and `blocks.py`; these compute the same outputs
and the same gradients, to rounding, and serve only where `suits` says so. What they avoid:

- copies: what autograd records of a view costs a tensor of zeros and a sum each way back;
- the gradient of a depthwise window of 5 or 7, for which the CPU library has no fast kernel;
- hidden activations of the FFN that fall out of the cache, and are read back for the gradient.

Letters: B batch, N = 1 + H*W tokens (class token first), h heads, C channels, c = C / h.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from coat_deploy.network.tokens import map_to_tokens, tokens_to_map

PIECE_ELEMENTS = 1 << 18
"""Hidden activations of the FFN held at once by each thread: 1 MiB, half of a core's L2 cache."""
PIECES_WORTH_IT = 8
"""Fewer pieces stay in the cache as they are, and computing them twice would only cost."""


def suits(x: Tensor) -> bool:
    """Tell whether a step on `x` is one of training on a CPU that PyTorch does not compile."""
    return x.is_cpu and torch.is_grad_enabled() and not torch.compiler.is_compiling()


def suits_pieces(x: Tensor, hidden: int) -> bool:
    """Tell whether an FFN with `hidden` channels has enough rows (..., C) to go in pieces.

    Not under autocast: sums over the pieces need the full precision of the weights.
    """
    if not suits(x) or torch.is_autocast_enabled("cpu"):
        return False
    elements = x.numel() // x.shape[-1] * hidden
    return elements >= PIECES_WORTH_IT * PIECE_ELEMENTS * torch.get_num_threads()


def embed_patches(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return `conv`, whose stride is its kernel, of a map (B, C', H', W') as tokens (B, H*W, C).

    One matrix product of patches laid out as rows: a convolution's own layouts cost more.
    """
    batch, channels, _, _ = x.shape
    patch = conv.kernel_size[0]
    height, width = x.shape[2] // patch, x.shape[3] // patch
    x = x[:, :, : height * patch, : width * patch].permute(0, 2, 3, 1)  # channels last: a view
    rows = x.reshape(batch, height, patch, width, patch, channels).transpose(2, 3)
    rows = rows.reshape(batch, height * width, patch * patch * channels)
    return nn.functional.linear(rows, conv.weight.permute(0, 2, 3, 1).flatten(1), conv.bias)


def encode_position(feature_map: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return X + DWConv(X) of a map X (B, C, H, W): X itself is a tap of 1 in mid-window."""
    padding = conv.kernel_size[0] // 2
    tap = nn.functional.pad(conv.weight.new_ones(1, 1), (padding,) * 4)
    feature_map = feature_map.contiguous(memory_format=torch.channels_last)
    return _depthwise(feature_map, conv.weight + tap, conv.bias)


def conv_attention(
    qkv: Tensor, num_heads: int, scale: float, windows: Sequence[nn.Conv2d], size: tuple[int, int]
) -> Tensor:
    """Return conv-attention (B, N, C) of Q, K, V side by side, (B, N, 3C).

    windows: the depthwise convolutions of CRPE; none leaves it out.
    """
    weights, biases = ([getattr(c, name) for c in windows] for name in ("weight", "bias"))
    with torch.autocast("cpu", enabled=False):
        attended: Tensor = _ConvAttention.apply(  # type: ignore[no-untyped-call]
            qkv, num_heads, scale, size, *weights, *biases
        )
    return attended


class _ConvAttention(torch.autograd.Function):
    """`scale * Q (softmax_N(K)^T V) + Q * DWConv(V)`, the second term on the image tokens."""

    @staticmethod
    def forward(
        ctx: Any, qkv: Tensor, num_heads: int, scale: float, size: tuple[int, int], *crpe: Tensor
    ) -> Tensor:
        q, k, v = qkv.chunk(3, dim=-1)
        q_heads, k_heads, v_heads = (_split(x, num_heads) for x in (q, k.softmax(dim=1), v))
        context = (k_heads.transpose(1, 2) @ v_heads).mul_(scale)  # (B*h, c, c)
        y = _join(q_heads @ context, num_heads).reshape(q.shape)
        v_map = encoded = weight = None
        if crpe:
            weight, bias = _as_one(crpe, qkv.dtype)
            v_map = tokens_to_map(v[:, 1:], size).contiguous(memory_format=torch.channels_last)
            encoded = map_to_tokens(_depthwise(v_map, weight, bias))
            y[:, 1:].addcmul_(q[:, 1:], encoded)
        ctx.save_for_backward(q, q_heads, k_heads, v_heads, context, v_map, encoded, weight)
        ctx.num_heads, ctx.scale, ctx.size = num_heads, scale, size
        ctx.crpe_shapes = [weight.shape for weight in crpe[: len(crpe) // 2]]
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, q_heads, k_heads, v_heads, context, v_map, encoded, weight = ctx.saved_tensors
        num_heads = ctx.num_heads
        grad_qkv = grad.new_empty(*grad.shape[:2], 3 * grad.shape[2])
        grad_q, grad_k, grad_v = grad_qkv.chunk(3, dim=-1)

        grad_heads = _split(grad, num_heads)
        grad_context = q_heads.transpose(1, 2) @ grad_heads
        # Softmax: K' = K * (G - sum_N(K * G)), where G = V grad_context^T. The sum over tokens is
        # one over the context instead, which holds softmax(K)^T V already.
        mean = (grad_context * context).sum(dim=-1)[:, None]  # (B*h, 1, c)
        grad_context.mul_(ctx.scale)
        grad_k_heads = torch.baddbmm(mean, v_heads, grad_context.transpose(1, 2), beta=-1)
        _write(grad_q, grad_heads @ context.transpose(1, 2), num_heads)
        _write(grad_k, grad_k_heads.mul_(k_heads), num_heads)
        _write(grad_v, k_heads @ grad_context, num_heads)
        if weight is None:
            return grad_qkv, None, None, None

        grad_encoded = grad[:, 1:] * q[:, 1:]
        grad_map = tokens_to_map(grad_encoded, ctx.size)
        grad_q[:, 1:].addcmul_(grad[:, 1:], encoded)
        grad_v[:, 1:].add_(map_to_tokens(_depthwise(grad_map, weight.flip(2, 3))))
        grad_weight = _depthwise_weight_gradient(v_map, grad_map, weight.shape[-1])
        grad_crpe = _as_many(grad_weight, grad_encoded.sum(dim=(0, 1)), ctx.crpe_shapes)
        return grad_qkv, None, None, None, *grad_crpe


def _as_one(crpe: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weights (C_w, 1, w, w) and then biases as one with the widest window.

    Zeros surround the narrow windows: one convolution takes less time than three.
    """
    weights, biases = crpe[: len(crpe) // 2], crpe[len(crpe) // 2 :]
    widest = max(weight.shape[-1] for weight in weights)
    padded = [nn.functional.pad(w, ((widest - w.shape[-1]) // 2,) * 4) for w in weights]
    return torch.cat(padded).to(dtype), torch.cat(tuple(biases)).to(dtype)


def _as_many(weight: Tensor, bias: Tensor, shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Return the parts of a joint weight and bias: the inverse of `_as_one`."""
    channels = [shape[0] for shape in shapes]
    margins = [(weight.shape[-1] - shape[-1]) // 2 for shape in shapes]
    weights = [
        part[:, :, margin : margin + shape[-1], margin : margin + shape[-1]]
        for part, margin, shape in zip(torch.split(weight, channels), margins, shapes, strict=True)
    ]
    return [*weights, *torch.split(bias, channels)]


def _split(x: Tensor, num_heads: int) -> Tensor:
    """Return tokens (B, N, C) head by head, (B*h, N, c)."""
    batch, tokens, channels = x.shape
    heads = x.reshape(batch, tokens, num_heads, channels // num_heads).transpose(1, 2)
    return heads.reshape(batch * num_heads, tokens, channels // num_heads)


def _join(heads: Tensor, num_heads: int) -> Tensor:
    """Return heads (B*h, N, c) as a view (B, N, h, c)."""
    rows, tokens, head_channels = heads.shape
    return heads.view(rows // num_heads, num_heads, tokens, head_channels).transpose(1, 2)


def _write(x: Tensor, heads: Tensor, num_heads: int) -> None:
    """Write heads (B*h, N, c) into tokens (B, N, C), part of a wider tensor."""
    x.view(*x.shape[:2], num_heads, -1).copy_(_join(heads, num_heads))


def _depthwise(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return the depthwise convolution of a map (B, C, H, W), of the same size."""
    padding = weight.shape[-1] // 2
    return nn.functional.conv2d(x, weight, bias, padding=padding, groups=x.shape[1])


def _depthwise_weight_gradient(x: Tensor, grad: Tensor, window: int) -> Tensor:
    """Return the gradient (C, 1, w, w) of a depthwise window from its map and the gradient of it.

    Each image's is the correlation of its map with its gradient, which is a depthwise
    convolution again: the gradient is the window, as large as the map, and images stand among
    the channels. Their sum is several times as fast as the library's own for windows of 5 and 7.
    """
    batch, channels, height, width = x.shape
    x = x.permute(2, 3, 0, 1).reshape(1, height, width, -1).permute(0, 3, 1, 2)
    filters = grad.reshape(-1, 1, height, width)
    correlated = nn.functional.conv2d(x, filters, padding=window // 2, groups=batch * channels)
    return correlated.reshape(batch, channels, 1, window, window).sum(dim=0)


def feed_forward(x: Tensor, fc1: nn.Linear, fc2: nn.Linear) -> Tensor:
    """Return fc2(GELU(fc1(x))) of (..., C), in pieces of rows whose hidden part fits the cache.

    The hidden part is not kept but computed again for the gradient: a sixth more products, and
    far less memory, of which the FFN otherwise takes the most.
    """
    rows = x.reshape(-1, x.shape[-1])
    y: Tensor = _FeedForward.apply(  # type: ignore[no-untyped-call]
        rows, fc1.weight, fc1.bias, fc2.weight, fc2.bias
    )
    return y.reshape(x.shape)


class _FeedForward(torch.autograd.Function):
    """Linear, GELU, linear of rows (R, C), piece by piece."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        y = torch.empty_like(x)
        for x_part, y_part in _pieces(len(weight1), x, y):
            hidden = torch.addmm(bias1, x_part, weight1.t())
            torch.addmm(bias2, nn.functional.gelu(hidden), weight2.t(), out=y_part)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight1, bias1, weight2 = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight1, grad_bias1, grad_weight2 = map(torch.zeros_like, (weight1, bias1, weight2))
        for x_part, g_part, grad_part in _pieces(len(weight1), x, grad, grad_x):
            hidden = torch.addmm(bias1, x_part, weight1.t())
            grad_weight2.addmm_(g_part.t(), nn.functional.gelu(hidden))
            grad_hidden = torch.ops.aten.gelu_backward(g_part @ weight2, hidden)
            grad_weight1.addmm_(grad_hidden.t(), x_part)
            grad_bias1 += grad_hidden.sum(dim=0)
            torch.mm(grad_hidden, weight1, out=grad_part)
        return grad_x, grad_weight1, grad_bias1, grad_weight2, grad.sum(dim=0)


def _pieces(hidden: int, *rows: Tensor) -> Any:
    """Yield as many of the rows (R, C) of each tensor at once as have `PIECE_ELEMENTS` hidden."""
    count = max(1, PIECE_ELEMENTS * torch.get_num_threads() // hidden)
    return zip(*(torch.split(x, count) for x in rows), strict=True)
