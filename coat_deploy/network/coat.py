"""CoaT: patch embeddings, four serial stages, parallel blocks, class-token head.

Source: Xu, Xu, Chang, Tu, "Co-Scale Conv-Attentional Image Transformers", ICCV 2021
(arXiv 2104.06399). Names of parameters are those of the authors' checkpoints.

Letters: B batch, H x W a map, N = 1 + H*W tokens (class token first), C channels, K classes.
"""

from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.network import cpu_training
from coat_deploy.network.blocks import LAYER_NORM_EPS, CoScale, ParallelBlock, SerialBlock
from coat_deploy.network.position import ConvPosEnc, ConvRelPosEnc
from coat_deploy.network.tokens import map_to_tokens, tokens_to_map
from coat_deploy.network.variants import Variant, get_variant

SCALES = (1, 2, 3, 4)


class PatchEmbed(nn.Module):
    """A convolution whose stride is its kernel, then a LayerNorm over the channels."""

    def __init__(self, in_channels: int, channels: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, channels, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(channels)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Return image tokens (B, H*W, C) of a map (B, C', H', W'), and (H, W)."""
        if cpu_training.suits(x):
            patch = self.proj.kernel_size[0]
            size = (x.shape[2] // patch, x.shape[3] // patch)
            return self.norm(cpu_training.embed_patches(x, self.proj)), size
        x = self.proj(x)
        return self.norm(map_to_tokens(x)), (x.shape[2], x.shape[3])


class CoaT(nn.Module):
    """A CoaT or CoaT-Lite of the sizes in `variant`.

    num_classes: K; 0 returns the class vector (B, C) instead of logits.
    features: return the four maps x1..x4 (B, C_s, H_s, W_s) instead; no norm, no head.
    cpe, crpe, co_scale: leave a part of the network out, or choose another strategy, for
        ablations. Published weights need the defaults.
    drop_path: probability of stochastic depth in training.
    gradient_checkpointing: recompute blocks in the backward pass, to save memory.
    """

    def __init__(
        self,
        variant: Variant,
        num_classes: int = 1000,
        *,
        features: bool = False,
        cpe: bool = True,
        crpe: bool = True,
        co_scale: CoScale = "interpolation",
        drop_path: float = 0.0,
        gradient_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        _check_options(num_classes, co_scale, drop_path)
        self.variant = variant
        self.num_classes = num_classes
        self.features = features
        self.gradient_checkpointing = gradient_checkpointing
        self._add_scales(cpe, crpe, drop_path)
        if variant.parallel_depth:
            self._add_parallel_blocks(co_scale, drop_path)
        if not features:
            self._add_head()
        self.apply(_initialise)
        for s in SCALES:
            nn.init.trunc_normal_(self._scale("cls_token", s), std=0.02)

    def _add_scales(self, cpe: bool, crpe: bool, drop_path: float) -> None:
        """Add what every scale has, under the names of the authors' checkpoints."""
        v = self.variant
        in_channels = (3, *v.channels[:3])
        patch_sizes = (v.patch_size, 2, 2, 2)
        for s, channels in zip(SCALES, v.channels, strict=True):
            embed = PatchEmbed(in_channels[s - 1], channels, patch_sizes[s - 1])
            shared_cpe = ConvPosEnc(channels) if cpe else None
            shared_crpe = ConvRelPosEnc(channels // v.num_heads, v.windows) if crpe else None
            blocks = nn.ModuleList(
                SerialBlock(
                    channels, v.num_heads, v.ffn_ratios[s - 1], shared_cpe, shared_crpe, drop_path
                )
                for _ in range(v.serial_depths[s - 1])
            )
            setattr(self, f"patch_embed{s}", embed)
            setattr(self, f"cls_token{s}", nn.Parameter(torch.zeros(1, 1, channels)))
            setattr(self, f"cpe{s}", shared_cpe)
            setattr(self, f"crpe{s}", shared_crpe)
            setattr(self, f"serial_blocks{s}", blocks)

    def _add_parallel_blocks(self, co_scale: CoScale, drop_path: float) -> None:
        v = self.variant
        assert len(set(v.channels[1:])) == 1, "parallel blocks share one FFN over their scales"
        assert len(set(v.ffn_ratios[1:])) == 1, "parallel blocks share one FFN over their scales"
        crpes = [self._scale("crpe", s) for s in SCALES[1:]]
        self.parallel_blocks = nn.ModuleList(
            ParallelBlock(v.channels[1], v.num_heads, v.ffn_ratios[1], crpes, co_scale, drop_path)
            for _ in range(v.parallel_depth)
        )

    def _add_head(self) -> None:
        v = self.variant
        if v.parallel_depth:
            self.norm2 = nn.LayerNorm(v.channels[1], eps=LAYER_NORM_EPS)
            self.norm3 = nn.LayerNorm(v.channels[2], eps=LAYER_NORM_EPS)
        self.norm4 = nn.LayerNorm(v.channels[3], eps=LAYER_NORM_EPS)
        if v.parallel_depth:
            self.aggregate = nn.Conv1d(3, 1, kernel_size=1)
        if self.num_classes:
            self.head = nn.Linear(v.num_features, self.num_classes)

    def _scale(self, name: str, s: int) -> Any:
        return getattr(self, f"{name}{s}")

    def forward(self, pixels: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Return logits (B, K) of normalised pixels (B, 3, H, W), or the maps x1..x4.

        Raises: UsageError for another shape, or a side below the network's minimum, 8 patches.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3:
            raise UsageError(
                f"{self.variant.name}: not a batch of RGB images "
                f"(got shape {tuple(pixels.shape)}, expected (B, 3, H, W))."
            )
        smallest = self.variant.min_side
        if pixels.shape[2] < smallest or pixels.shape[3] < smallest:
            raise UsageError(
                f"image {pixels.shape[2]}x{pixels.shape[3]}: too small for {self.variant.name} "
                f"(both sides must be at least {smallest} pixels). Choose a larger size."
            )
        scales, sizes = self._serial(pixels)
        if self.variant.parallel_depth:
            scales[1:] = self._parallel(scales[1:], sizes[1:])
        if self.features:
            pairs = zip(scales, sizes, strict=True)
            return tuple(tokens_to_map(x[:, 1:], size) for x, size in pairs)
        return self._classify(scales)

    def _serial(self, x: Tensor) -> tuple[list[Tensor], list[tuple[int, int]]]:
        """Return tokens (B, N_s, C_s) and map size of each scale."""
        scales, sizes = [], []
        for s in SCALES:
            image, size = self._scale("patch_embed", s)(x)
            cls = self._scale("cls_token", s).expand(image.shape[0], -1, -1)
            tokens = torch.cat((cls, image), dim=1)
            for block in self._scale("serial_blocks", s):
                tokens = self._run(block, tokens, size)
            x = tokens_to_map(tokens[:, 1:], size)
            scales.append(tokens)
            sizes.append(size)
        return scales, sizes

    def _parallel(self, scales: list[Tensor], sizes: list[tuple[int, int]]) -> list[Tensor]:
        cpes = [self._scale("cpe", s) for s in SCALES[1:]]
        for block in self.parallel_blocks:
            if cpes[0] is not None:
                triples = zip(cpes, scales, sizes, strict=True)
                scales = [cpe(x, size) for cpe, x, size in triples]
            scales = self._run(block, scales, sizes)
        return scales

    def _run(self, block: nn.Module, *arguments: Any) -> Any:
        if self.gradient_checkpointing and self.training:
            return checkpoint(block, *arguments, use_reentrant=False)
        return block(*arguments)

    def _classify(self, scales: list[Tensor]) -> Tensor:
        """Return logits of the class token of scale 4, or of scales 2 to 4 aggregated."""
        # All tokens are normed, as the authors do and the published MACs count it.
        cls = self.norm4(scales[3])[:, 0]
        if self.variant.parallel_depth:
            tokens = (self.norm2(scales[1])[:, 0], self.norm3(scales[2])[:, 0], cls)
            cls = self.aggregate(torch.stack(tokens, dim=1)).squeeze(1)  # (B, C)
        return self.head(cls) if self.num_classes else cls


def _check_options(num_classes: int, co_scale: str, drop_path: float) -> None:
    if num_classes < 0:
        raise UsageError(f"num_classes: must be 0 or more (got {num_classes}).")
    if co_scale not in get_args(CoScale):
        raise UsageError(unknown_name("co-scale strategy", co_scale, get_args(CoScale)))
    if not 0 <= drop_path < 1:
        raise UsageError(f"drop_path: must be 0 or more and below 1 (got {drop_path}).")


def _initialise(module: nn.Module) -> None:
    """Initialise as the authors do; convolutions keep PyTorch's default."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def create_network(
    name: str,
    num_classes: int = 1000,
    *,
    features: bool = False,
    cpe: bool = True,
    crpe: bool = True,
    co_scale: CoScale = "interpolation",
    drop_path: float = 0.0,
    gradient_checkpointing: bool = False,
) -> CoaT:
    """Create a CoaT by the name of its variant, freshly initialised; options as in `CoaT`.

    Raises: UsageError with the nearest name, or for an option that cannot be.

    >>> create_network("coat_lite_mini", num_classes=10, features=False)  # doctest: +SKIP
    """
    return CoaT(
        get_variant(name),
        num_classes,
        features=features,
        cpe=cpe,
        crpe=crpe,
        co_scale=co_scale,
        drop_path=drop_path,
        gradient_checkpointing=gradient_checkpointing,
    )
