"""A network whose blocks use the fused operators: the same weights, the same results."""

import torch
from torch import Tensor, nn

from coat_deploy.network.attention import FactorizedConvAttention
from coat_deploy.network.blocks import Mlp, ParallelBlock, SerialBlock
from coat_deploy.network.coat import SCALES, CoaT
from coat_deploy.network.fused import operators, plan
from coat_deploy.network.position import ConvPosEnc, ConvRelPosEnc

FFN_CHANNELS = (16, 32, 64, 128)
"""Widths whose tokens, normed and summed, stay in registers; wider FFNs are bound by their matrix
products, and left to the library's."""
FFN_TOKENS = 1 << 14
"""Tokens of a batch from which on one pass is worth it: fewer leave a GPU without work."""


def fuse(network: CoaT, *, feed_forward: bool = True) -> CoaT:
    """Put the fused operators into the blocks of `network`, in place, for inference; return it.

    feed_forward: fuse LayerNorm and FFN of narrow scales, too, where a batch has many tokens. That
    asks for the size of the batch, and so is not for a graph of every batch size.
    Direct cross-layer attention stays as it is: its K and V are of another scale.
    """
    for s in SCALES:
        cpe, crpe = getattr(network, f"cpe{s}"), getattr(network, f"crpe{s}")
        position = None if cpe is None else FusedPosEnc(cpe)
        windows = None if crpe is None else PackedWindows.of(crpe)
        blocks = getattr(network, f"serial_blocks{s}")
        for i, block in enumerate(blocks):
            blocks[i] = FusedSerialBlock(block, position, windows, feed_forward)
        setattr(network, f"cpe{s}", position)
        setattr(network, f"crpe{s}", windows)
        if network.variant.parallel_depth and s > 1:
            for block in network.parallel_blocks:
                _fuse_attention(block, s, windows)
    for module in network.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.LayerNorm):
                setattr(module, name, FusedLayerNorm.of(child))
    return network.eval()


def lower(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Store the weights of a fused network in `dtype`, in which its tokens are then; return it.

    The windows stay float32: they are buffers, small, and summed in it.
    """
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    return network


def _fuse_attention(block: nn.Module, scale: int, windows: "PackedWindows | None") -> None:
    assert isinstance(block, ParallelBlock)
    if block.co_scale != "direct":
        name = f"factoratt_crpe{scale}"
        setattr(block, name, FusedConvAttention(getattr(block, name), windows))


def pack(convolutions: list[nn.Conv2d]) -> tuple[Tensor, Tensor]:
    """Return depthwise windows as taps (S * S, C), narrow ones among zeros, and biases (C,).

    float32: they are small, and are summed in it.
    """
    side = max(conv.kernel_size[0] for conv in convolutions)
    padded = [
        nn.functional.pad(conv.weight, ((side - conv.kernel_size[0]) // 2,) * 4)
        for conv in convolutions
    ]
    taps = torch.cat(padded).flatten(1).t().contiguous().float()
    biases = [
        conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias
        for conv in convolutions
    ]
    return taps.detach(), torch.cat(biases).float().detach()


class PackedWindows(nn.Module):
    """The windows of CRPE as the operators read them; `windows` holds that of every head."""

    taps: Tensor
    bias: Tensor

    def __init__(self, convolutions: list[nn.Conv2d], windows: list[int]) -> None:
        super().__init__()
        self.windows = windows
        taps, bias = pack(convolutions)
        self.register_buffer("taps", taps, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    @classmethod
    def of(cls, crpe: ConvRelPosEnc) -> "PackedWindows":
        """Pack the windows of `crpe`."""
        convolutions = crpe.windows()
        windows = [
            conv.kernel_size[0]
            for conv in convolutions
            for _ in range(conv.out_channels // crpe.head_channels)
        ]
        assert set(windows) <= set(plan.WINDOWS), windows
        assert len(plan.window_blocks(windows, 1, 1)) <= plan.NUM_KINDS  # runs of heads alike
        return cls(convolutions, windows)


class FusedPosEnc(nn.Module):
    """CPE by one operator."""

    taps: Tensor
    bias: Tensor

    def __init__(self, cpe: ConvPosEnc) -> None:
        super().__init__()
        taps, bias = pack([cpe.proj])
        self.register_buffer("taps", taps, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return tokens (B, N, C) with their position encoded; the class token passes through."""
        return operators.encode_position(x, self.taps, self.bias, *size)


class FusedLayerNorm(nn.LayerNorm):
    """LayerNorm over the channels by one operator, where no compiler joins it to its neighbours."""

    @classmethod
    def of(cls, norm: nn.LayerNorm) -> "FusedLayerNorm":
        """Return one with the parameters of `norm`."""
        fused = cls(norm.normalized_shape, norm.eps, device="meta")
        fused.weight, fused.bias = norm.weight, norm.bias
        return fused

    def forward(self, x: Tensor) -> Tensor:
        """Return (..., C) of tokens (..., C)."""
        if torch.compiler.is_compiling():
            return super().forward(x)
        return operators.layer_norm(x, self.weight, self.bias, self.eps)


class FusedConvAttention(nn.Module):
    """Conv-attention by one operator between its two projections."""

    def __init__(self, attention: FactorizedConvAttention, windows: PackedWindows | None) -> None:
        super().__init__()
        self.num_heads = attention.num_heads
        self.qkv, self.proj = attention.qkv, attention.proj
        self.crpe = windows

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return ConvAtt(X) projected, (B, N, C), of tokens (B, N, C) on a map of `size`."""
        taps, bias, windows = None, None, [1] * self.num_heads
        if self.crpe is not None:
            taps, bias, windows = self.crpe.taps, self.crpe.bias, self.crpe.windows
        qkv = self.qkv(x)
        attended = operators.conv_attention(qkv, taps, bias, self.num_heads, windows, *size)
        return self.proj(attended)


class FusedSerialBlock(nn.Module):
    """A serial block without stochastic depth, whose narrow FFN is one operator."""

    def __init__(
        self,
        block: SerialBlock,
        cpe: FusedPosEnc | None,
        windows: PackedWindows | None,
        feed_forward: bool,
    ) -> None:
        super().__init__()
        self.cpe = cpe
        self.norm1, self.norm2 = block.norm1, block.norm2
        self.factoratt_crpe = FusedConvAttention(block.factoratt_crpe, windows)
        self.mlp = block.mlp
        self.fuse_mlp = feed_forward and block.norm2.normalized_shape[0] in FFN_CHANNELS

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """Return (B, N, C) of tokens (B, N, C) on a map of `size`."""
        if self.cpe is not None:
            x = self.cpe(x, size)
        x = x + self.factoratt_crpe(self.norm1(x), size)
        if self.fuse_mlp and x.shape[0] * x.shape[1] >= FFN_TOKENS:
            return feed_forward(x, self.norm2, self.mlp)
        return x + self.mlp(self.norm2(x))


def feed_forward(x: Tensor, norm: nn.LayerNorm, mlp: Mlp) -> Tensor:
    """Return X + FFN(LayerNorm(X)) by one operator."""
    weights = (norm.weight, norm.bias, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    return operators.feed_forward(x, *weights, norm.eps)
