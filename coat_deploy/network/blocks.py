"""Serial blocks, and parallel (co-scale) blocks over the last three scales.

Source: arXiv 2104.06399, section 4 and figures 3 and 4.

Letters: B batch, N = 1 + H*W tokens of a scale, C channels; (B, N, C) everywhere.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from coat_deploy.network import cpu_training
from coat_deploy.network.attention import FactorizedConvAttention, resample, resample_heads
from coat_deploy.network.position import ConvPosEnc, ConvRelPosEnc

CoScale = Literal["interpolation", "direct", "none"]
"""How parallel blocks exchange scales: feature interpolation (the published weights), direct
cross-layer attention, or not at all (the paper's ablation)."""

LAYER_NORM_EPS = 1e-6


class Mlp(nn.Module):
    """Feed-forward network (FFN): linear, GELU, linear."""

    def __init__(self, channels: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels * ratio)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(channels * ratio, channels)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, N, C) of (B, N, C)."""
        if cpu_training.suits_pieces(x, self.fc1.out_features):
            return cpu_training.feed_forward(x, self.fc1, self.fc2)
        return self.fc2(self.act(self.fc1(x)))


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for a whole image (arXiv 1603.09382).

    The same probability in every block, as the authors have it.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, x: Tensor, branch: Tensor) -> Tensor:
        """Return `x + branch`, in training without the branch for a random share of the images.

        It is scaled up for the others.
        """
        if not self.training or self.probability == 0:
            return x + branch
        keep = 1 - self.probability
        mask = branch.new_empty((len(branch),) + (1,) * (branch.ndim - 1)).bernoulli_(keep)
        return torch.addcmul(x, branch, mask / keep)


class SerialBlock(nn.Module):
    """CPE, conv-attention, FFN; the last two as residuals after a LayerNorm."""

    def __init__(
        self,
        channels: int,
        num_heads: int,
        ffn_ratio: int,
        cpe: ConvPosEnc | None,
        crpe: ConvRelPosEnc | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.cpe = cpe
        self.norm1 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.factoratt_crpe = FactorizedConvAttention(channels, num_heads, crpe)
        self.norm2 = nn.LayerNorm(channels, eps=LAYER_NORM_EPS)
        self.mlp = Mlp(channels, ffn_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return (B, N, C) of tokens (B, N, C) on a map of `size`."""
        if self.cpe is not None:
            x = self.cpe(x, size)
        x = self.drop_path(x, self.factoratt_crpe(self.norm1(x), size))
        return self.drop_path(x, self.mlp(self.norm2(x)))


class ParallelBlock(nn.Module):
    """Conv-attention on scales 2, 3, 4, exchanged between them; then one FFN that they share.

    The scales' CPE is applied outside, once a block, by the network. The checkpoint's keys count
    scales 2 to 4; all lists here hold one entry for each of them, in that order.
    """

    def __init__(
        self,
        channels: int,
        num_heads: int,
        ffn_ratio: int,
        crpes: Sequence[ConvRelPosEnc | None],
        co_scale: CoScale,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.co_scale = co_scale
        self.norm12, self.norm13, self.norm14 = (
            nn.LayerNorm(channels, eps=LAYER_NORM_EPS) for _ in range(3)
        )
        self.factoratt_crpe2, self.factoratt_crpe3, self.factoratt_crpe4 = (
            FactorizedConvAttention(channels, num_heads, crpe) for crpe in crpes
        )
        self.norm22, self.norm23, self.norm24 = (
            nn.LayerNorm(channels, eps=LAYER_NORM_EPS) for _ in range(3)
        )
        self.mlp2 = self.mlp3 = self.mlp4 = Mlp(channels, ffn_ratio)
        self.drop_path = DropPath(drop_path)

    def forward(self, scales: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Return three scales of tokens (B, N_s, C) of three scales."""
        norms = (self.norm12, self.norm13, self.norm14)
        normed = [norm(x) for norm, x in zip(norms, scales, strict=True)]
        attended = self.cross_attend(normed, sizes)
        scales = [self.drop_path(x, y) for x, y in zip(scales, attended, strict=True)]
        norms = (self.norm22, self.norm23, self.norm24)
        return [
            self.drop_path(x, self.mlp2(norm(x))) for norm, x in zip(norms, scales, strict=True)
        ]

    def cross_attend(self, scales: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Return the attention of every scale, with what it takes from the others."""
        attentions = (self.factoratt_crpe2, self.factoratt_crpe3, self.factoratt_crpe4)
        if self.co_scale == "direct":
            return self.attend_directly(attentions, scales, sizes)
        outputs = [
            attention(x, size) for attention, x, size in zip(attentions, scales, sizes, strict=True)
        ]
        if self.co_scale == "none":
            return outputs
        return self.exchange(outputs, sizes)

    @staticmethod
    def exchange(outputs: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        """Feature interpolation: every scale gets the sum of all, resampled to its size.

        The class tokens, which have no size, are summed unchanged.
        """
        exchanged = []
        for s, size in enumerate(sizes):
            others = [resample(outputs[t], sizes[t], size) for t in range(3) if t != s]
            exchanged.append(outputs[s] + others[0] + others[1])
        return exchanged

    @staticmethod
    def attend_directly(
        attentions: Sequence[FactorizedConvAttention],
        scales: list[Tensor],
        sizes: list[tuple[int, int]],
    ) -> list[Tensor]:
        """Direct cross-layer attention: Q of a scale with K and V of each scale, summed.

        Cross-attention extends conv-attention: CRPE of the query's scale acts on the foreign V
        too. The sum is projected once.
        """
        heads = [a.split_heads(x) for a, x in zip(attentions, scales, strict=True)]
        attended = []
        for s, (attention, size) in enumerate(zip(attentions, sizes, strict=True)):
            q = heads[s][0]
            terms = []
            for t in range(3):
                k, v = heads[t][1:]
                if t != s:
                    k, v = (resample_heads(x, sizes[t], size) for x in (k, v))
                terms.append(attention.attend(q, k, v, size))
            attended.append(attention.merge_heads(torch.stack(terms).sum(0)))
        return attended
