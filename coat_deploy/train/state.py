"""The tensors of a training, whole, whether the processes hold copies of them or parts."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from coat_deploy.train.average import Average
from coat_deploy.train.checkpoint import Checkpoint, Position
from coat_deploy.train.sharding import is_sharded, reshard

Weights = dict[str, Tensor]

_WHOLE = StateDictOptions(full_state_dict=True)
_GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
_SPREAD = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)


def read_weights(network: nn.Module) -> Weights:
    """Return the weights by key, whole, on the CPU; in every process, and all take part."""
    if is_sharded(network):
        weights: Mapping[str, Any] = get_model_state_dict(network, options=_WHOLE)
    else:
        weights = network.state_dict()
    return {key: value.detach().cpu().clone() for key, value in weights.items()}


def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the network what `read_weights` returned."""
    if is_sharded(network):
        set_model_state_dict(network, dict(weights), options=_SPREAD)
    else:
        network.load_state_dict(weights)


def read_checkpoint(
    accelerator: Accelerator,
    network: nn.Module,
    optimiser: Any,
    average: Average,
    position: Position,
    best: Mapping[str, Tensor],
    run: Mapping[str, Any],
) -> Checkpoint:
    """Return everything that a training needs to go on; every process takes part.

    network: as it was created; optimiser: as Accelerate prepared it. Of a sharded one only the
    first process gets the optimiser's state.
    """
    if is_sharded(network):
        reshard(network)
        optimiser_state = get_optimizer_state_dict(network, optimiser.optimizer, options=_GATHERED)
    else:
        optimiser_state = optimiser.state_dict()
    scaler = accelerator.scaler
    return Checkpoint(
        run=run,
        position=position,
        network=read_weights(network),
        optimiser=optimiser_state,
        average=_gathered(average),
        updates=average.updates,
        scaler=scaler.state_dict() if scaler is not None else {},
        best=best,
    )


def load_checkpoint_into(
    accelerator: Accelerator,
    network: nn.Module,
    optimiser: Any,
    average: Average,
    checkpoint: Checkpoint,
) -> None:
    """Give network, optimiser, average and scaler what a checkpoint holds."""
    load_weights(network, checkpoint.network)
    if is_sharded(network):
        reshard(network)
        set_optimizer_state_dict(
            network, optimiser.optimizer, dict(checkpoint.optimiser), options=_SPREAD
        )
    else:
        optimiser.optimizer.load_state_dict(checkpoint.optimiser)
    average.load(
        {
            name: _like(target, checkpoint.average[name])
            for name, target in zip(average.names, average.tensors, strict=bool(average.decay))
        },
        checkpoint.updates,
    )
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(dict(checkpoint.scaler))


def _gathered(average: Average) -> Weights:
    names = average.names if average.decay else []
    return {
        name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).cpu().clone()
        for name, tensor in zip(names, average.tensors, strict=True)
    }


def _like(target: Tensor, value: Tensor) -> Tensor:
    """Return a whole tensor laid out over the processes as `target` is."""
    if isinstance(target, DTensor):
        return distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    return value.to(target.device)


def same_everywhere(accelerator: Accelerator, *asked: bool) -> list[bool]:
    """Return for each question whether any process answers yes."""
    if accelerator.num_processes == 1:
        return list(asked)
    answers = torch.tensor(asked, dtype=torch.float32, device=accelerator.device)
    return [bool(answer) for answer in accelerator.reduce(answers, "sum")]
