"""Networks of which each process holds a part of every parameter (FSDP 2)."""

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor


def is_sharded(network: nn.Module) -> bool:
    """Tell whether each process holds a part of every parameter."""
    return any(isinstance(module, FSDPModule) for module in network.modules())


def reshard(network: nn.Module) -> None:
    """Let go of the whole parameters that a forward pass left; of no effect on other networks.

    The outermost part keeps them for the backward pass. Without one the next pass would take
    them for current, whatever the parts were set to in between.
    """
    for module in network.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def own_part(tensor: Tensor) -> Tensor:
    """Return what this process holds of a tensor, in the same memory; all of one not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()
