"""AdamW over groups of parameters: what decays, and how fast each layer learns."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW

from coat_deploy.network.depth import layer_count, layer_of
from coat_deploy.network.variants import Variant
from coat_deploy.train.recipe import Recipe


def create_optimiser(network: nn.Module, variant: Variant, recipe: Recipe) -> AdamW:
    """Return AdamW with a group for each layer and decay; each has its `scale` of the rate.

    Biases, norms and class tokens do not decay, as in the authors' scripts. With a `layer_decay`
    below 1 a layer's rate is that of the next one times it (ELECTRA, arXiv 2003.10555); the head
    learns at the full rate.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        layer = layer_of(name, variant) if recipe.layer_decay < 1 else 0
        groups.setdefault((layer, decays(name, parameter)), []).append(parameter)
    last = layer_count(variant) - 1 if recipe.layer_decay < 1 else 0
    options: list[dict[str, Any]] = [
        {
            "params": parameters,
            "weight_decay": recipe.weight_decay if decaying else 0.0,
            "scale": recipe.layer_decay ** (last - layer),
        }
        for (layer, decaying), parameters in sorted(groups.items())
    ]
    device = next(network.parameters()).device.type
    return AdamW(options, lr=0.0, fused=device in ("cpu", "cuda"))


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether a parameter has weight decay."""
    return parameter.ndim > 1 and not name.startswith("cls_token")


def set_rate(optimiser: torch.optim.Optimizer, rate: float) -> None:
    """Give every group its share of the learning rate."""
    for group in optimiser.param_groups:
        group["lr"] = rate * group["scale"]


def parameters(optimiser: torch.optim.Optimizer) -> Iterator[torch.Tensor]:
    """Yield every parameter."""
    for group in optimiser.param_groups:
        yield from group["params"]
