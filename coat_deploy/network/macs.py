"""Parameters and multiply-accumulates (MACs) of a network, counted without running it."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from coat_deploy.network.coat import CoaT, create_network
from coat_deploy.spec import ModelSpec, Size

MACS_PER_NORM_ELEMENT = 5
MACS_PER_RESAMPLED_ELEMENT = 4
"""fvcore's convention, in which the figures published for CoaT are given."""


def count_parameters(network: torch.nn.Module) -> int:
    """Return the number of parameters; what blocks share counts once."""
    return sum(parameter.numel() for parameter in network.parameters())


def count_macs(network: CoaT, size: Size) -> int:
    """Return the MACs of one image of `size` (height, width).

    Convolutions and matrix products at one MAC a multiplication, LayerNorm and bilinear
    resampling as fvcore counts them, everything else free. Runs on the meta device, so it takes
    no memory and well under a second.
    """
    network = _on_meta(network)
    counter = FlopCounterMode(
        display=False,
        custom_mapping={
            torch.ops.aten.native_layer_norm: _norm_flops,
            torch.ops.aten.upsample_bilinear2d: _resample_flops,
        },
    )
    with torch.no_grad(), counter:
        network(torch.empty(1, 3, *size, device="meta"))
    return int(counter.get_total_flops()) // 2


def count(spec: ModelSpec, size: Size) -> tuple[int, int]:
    """Return parameters and MACs of one image of `size`, of the network that `spec` describes."""
    with torch.device("meta"):
        network = create_network(spec.architecture, spec.num_classes, **spec.model_args)
    return count_parameters(network), count_macs(network, size)


def _on_meta(network: CoaT) -> CoaT:
    """Return the same network without data, in evaluation mode."""
    return copy.deepcopy(network).to("meta").eval()


def _norm_flops(shape: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * MACS_PER_NORM_ELEMENT * torch.Size(shape).numel()


def _resample_flops(shape: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
    return 2 * MACS_PER_RESAMPLED_ELEMENT * torch.Size(out_shape).numel()
