"""The exponential moving average of the weights: evaluated and kept instead of the last ones."""

import contextlib
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from coat_deploy.train.schedule import average_decay
from coat_deploy.train.sharding import own_part, reshard


class Average:
    """An average of the parameters of `network`, which has no buffers; with `decay` 0, of none.

    The tensors are laid out as the network's, so that each process of a sharded training
    averages its own part.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        assert not list(network.buffers()), "buffers would need averaging, too"
        reshard(network)
        named = list(network.named_parameters())
        self.names = [name for name, _ in named]
        self.decay = decay
        self.updates = 0
        self._network = network
        self._parameters: list[Tensor] = [parameter for _, parameter in named]
        self.tensors = [p.detach().clone() for p in self._parameters] if decay else []

    @torch.no_grad()
    def update(self) -> None:
        """Move the average towards the parameters, after a step."""
        if self.decay:
            weight = 1 - average_decay(self.updates, self.decay)
            torch._foreach_lerp_(_own(self.tensors), _own(self._parameters), weight)
            self.updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the network hold the average while the body runs."""
        if not self.decay:
            yield
            return
        kept = [parameter.detach().clone() for parameter in self._parameters]
        self._put(self.tensors)
        try:
            yield
        finally:
            self._put(kept)

    @torch.no_grad()
    def _put(self, tensors: Sequence[Tensor]) -> None:
        torch._foreach_copy_(_own(self._parameters), _own(tensors))
        reshard(self._network)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], updates: int) -> None:
        """Take what a checkpoint held."""
        assert set(tensors) == set(self.names if self.decay else ())
        for name, target in zip(self.names, self.tensors, strict=bool(self.decay)):
            target.copy_(tensors[name])
        self.updates = updates


def _own(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [own_part(tensor) for tensor in tensors]
