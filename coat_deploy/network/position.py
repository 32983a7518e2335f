"""The two convolutional position encodings of CoaT.

Source: arXiv 2104.06399, section 3.2 (CRPE) and figure 2 (CPE).

Letters: B batch, h heads, c = C / h channels a head, N = 1 + H*W tokens, class token first.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from coat_deploy.network import cpu_training
from coat_deploy.network.tokens import map_to_tokens, tokens_to_map


class ConvPosEnc(nn.Module):
    """Convolutional position encoding (CPE): `X <- X + DWConv3x3(X)` on the image tokens.

    One object serves every block of a scale.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, channels, kernel_size=3, padding=1, groups=channels)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return tokens (B, N, C) with their position encoded; the class token passes through."""
        cls, image = torch.split(x, [1, x.shape[1] - 1], dim=1)
        feature_map = tokens_to_map(image, size)
        if cpu_training.suits(x):
            encoded = cpu_training.encode_position(feature_map, self.proj)
        else:
            encoded = feature_map + self.proj(feature_map)
        return torch.cat((cls, map_to_tokens(encoded)), dim=1)


class ConvRelPosEnc(nn.Module):
    """Convolutional relative position encoding (CRPE): `EV = Q * DWConv(P, V)`.

    `EV_i = sum_{j in window(i)} p_{j-i} (q_i . v_j)` with every channel its own head is one
    depthwise convolution of V over the image tokens. `windows` splits the heads over window
    sizes. One object serves every block of a scale.
    """

    def __init__(self, head_channels: int, windows: Sequence[tuple[int, int]]) -> None:
        super().__init__()
        self.head_channels = head_channels
        self.channel_splits = [num_heads * head_channels for _, num_heads in windows]
        self.conv_list = nn.ModuleList(
            nn.Conv2d(channels, channels, window, padding=window // 2, groups=channels)
            for (window, _), channels in zip(windows, self.channel_splits, strict=True)
        )

    def windows(self) -> list[nn.Conv2d]:
        """Return the convolutions, one a window size."""
        return [conv for conv in self.conv_list if isinstance(conv, nn.Conv2d)]

    def forward(self, q: Tensor, v: Tensor, size: tuple[int, int]) -> Tensor:
        """Return `EV` (B, h, N, c) from Q and V of the same shape; zero at the class token."""
        batch, heads, _, head_channels = q.shape
        v_map = v[:, :, 1:].transpose(-1, -2).reshape(batch, heads * head_channels, *size)
        parts = torch.split(v_map, self.channel_splits, dim=1)
        encoded = torch.cat([conv(v) for conv, v in zip(self.conv_list, parts, strict=True)], 1)
        encoded = encoded.reshape(batch, heads, head_channels, -1).transpose(-1, -2)
        return nn.functional.pad(q[:, :, 1:] * encoded, (0, 0, 1, 0))
