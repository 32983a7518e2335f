"""Conv-attention: factorized attention with convolutional relative position encoding.

    FactorAtt(X) = Q / sqrt(c) (softmax_N(K)^T V)
    ConvAtt(X)   = FactorAtt(X) + Q * DWConv(P, V)          Q of the second term is not scaled

Source: arXiv 2104.06399, equations 4 to 7. Time O(N c C), linear in the number of tokens.

Letters: B batch, h heads, C channels, c = C / h, N = 1 + H*W tokens, class token first.
"""

import torch
from torch import Tensor, nn

from coat_deploy.network import cpu_training
from coat_deploy.network.position import ConvRelPosEnc
from coat_deploy.network.tokens import map_to_tokens, tokens_to_map


class FactorizedConvAttention(nn.Module):
    """Conv-attention with its projections; `crpe` is shared by the scale, or None to leave out."""

    def __init__(self, channels: int, num_heads: int, crpe: ConvRelPosEnc | None) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.scale = (channels // num_heads) ** -0.5
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.crpe = crpe

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return ConvAtt(X) projected, (B, N, C), of tokens (B, N, C) on a map of `size`."""
        if cpu_training.suits(x):
            windows = () if self.crpe is None else self.crpe.windows()
            attended = cpu_training.conv_attention(
                self.qkv(x), self.num_heads, self.scale, windows, size
            )
            return self.proj(attended)
        q, k, v = self.split_heads(x)
        return self.merge_heads(self.attend(q, k, v, size))

    def split_heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return Q, K, V, (B, h, N, c) each."""
        batch, tokens, channels = x.shape
        qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, channels // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        return q, k, v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """Return conv-attention (B, h, N, c) before the output projection."""
        factor_att = q @ (k.softmax(dim=-2).transpose(-1, -2) @ v)  # (B, h, N, c)
        if self.crpe is None:
            return self.scale * factor_att
        return self.scale * factor_att + self.crpe(q, v, size)

    def merge_heads(self, y: Tensor) -> Tensor:
        """Return heads (B, h, N, c) put side by side and projected, (B, N, C)."""
        return self.proj(y.transpose(1, 2).flatten(2))


def resample(x: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Resample tokens (B, N, C) of a map bilinearly to another size; CLS passes through.

    By target size, as the authors do: resampling by a factor (timm) gives other sizes where a
    side is no multiple of 32.
    """
    cls, image = x[:, :1], x[:, 1:]
    feature_map = nn.functional.interpolate(
        tokens_to_map(image, size), size=new_size, mode="bilinear", align_corners=False
    )
    return torch.cat((cls, map_to_tokens(feature_map)), dim=1)


def resample_heads(x: Tensor, size: tuple[int, int], new_size: tuple[int, int]) -> Tensor:
    """Resample K or V (B, h, N, c) of one scale to the resolution of another."""
    batch, heads, _, head_channels = x.shape
    resampled = resample(x.transpose(1, 2).flatten(2), size, new_size)
    return resampled.reshape(batch, -1, heads, head_channels).transpose(1, 2)
