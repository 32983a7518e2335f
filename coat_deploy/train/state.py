"""The tensors of a training, whole, whether the processes hold copies of them or parts."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from coat_deploy.train.average import Average
from coat_deploy.train.checkpoint import Checkpoint, Position
from coat_deploy.train.optimiser import parameters
from coat_deploy.train.sharding import reshard

Weights = dict[str, Tensor]


@torch.no_grad()
def read_weights(network: nn.Module) -> Weights:
    """Return the weights by key, whole, on the CPU; in every process, and all take part.

    Keys of one parameter have one tensor.
    """
    reshard(network)
    whole = {parameter: _whole(parameter) for parameter in network.parameters()}
    named = network.named_parameters(remove_duplicate=False)
    return {name: whole[parameter] for name, parameter in named}


@torch.no_grad()
def load_weights(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the network what `read_weights` returned; every process has all of it."""
    reshard(network)
    for name, parameter in network.named_parameters():
        assert parameter.shape == weights[name].shape
        parameter.copy_(_like(parameter, weights[name]))


def read_checkpoint(
    accelerator: Accelerator,
    network: nn.Module,
    optimiser: Any,
    average: Average,
    position: Position,
    best: Mapping[str, Tensor],
    run: Mapping[str, Any],
) -> Checkpoint:
    """Return everything that a training needs to go on, whole; every process takes part.

    network: as it was created; optimiser: as Accelerate prepared it.
    """
    state = optimiser.state_dict()
    scaler = accelerator.scaler
    return Checkpoint(
        run=run,
        position=position,
        network=read_weights(network),
        optimiser={
            **state,
            "state": {
                i: {key: _whole(value) for key, value in values.items()}
                for i, values in state["state"].items()
            },
        },
        average=dict(zip(average.names, map(_whole, average.tensors), strict=bool(average.decay))),
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
    state = checkpoint.optimiser["state"]
    spread = {
        i: {key: _like(parameter, value) for key, value in state[i].items()}
        for i, parameter in enumerate(parameters(optimiser.optimizer))
        if i in state
    }
    optimiser.optimizer.load_state_dict({**checkpoint.optimiser, "state": spread})
    targets = zip(average.names, average.tensors, strict=bool(average.decay))
    average.load(
        {name: _like(target, checkpoint.average[name]) for name, target in targets},
        checkpoint.updates,
    )
    if accelerator.scaler is not None:
        accelerator.scaler.load_state_dict(dict(checkpoint.scaler))


def _whole(value: Any) -> Any:
    """Return a copy of a tensor on the CPU, put together from the processes' parts."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()


def _like(target: Tensor, value: Any) -> Any:
    """Return a whole tensor laid out over the processes as `target` is, if it has its shape."""
    if isinstance(target, DTensor) and isinstance(value, Tensor) and value.shape == target.shape:
        return distribute_tensor(
            value.to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
    return value


def same_everywhere(accelerator: Accelerator, *asked: bool) -> list[bool]:
    """Return for each question whether any process answers yes."""
    if accelerator.num_processes == 1:
        return list(asked)
    answers = torch.tensor(asked, dtype=torch.float32, device=accelerator.device)
    return [bool(answer) for answer in accelerator.reduce(answers, "sum")]
