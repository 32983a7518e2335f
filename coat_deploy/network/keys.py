"""The keys of a checkpoint: which the network has, which it shares, which it never uses.

Importing this file does not import PyTorch; asking for shapes does.
"""

from typing import Any

from coat_deploy.network.random_weights import Shape
from coat_deploy.network.variants import get_variant
from coat_deploy.spec import ModelSpec


def expected_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return the shape of every key of the network's state_dict, without allocating it."""
    return {key: tuple(value.shape) for key, value in _network(spec).state_dict().items()}


def shared_parameters(spec: ModelSpec) -> list[tuple[str, ...]]:
    """Return the groups of keys that are one parameter of the network."""
    groups: dict[int, list[str]] = {}
    for key, parameter in _network(spec).named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(key)
    return [tuple(keys) for keys in groups.values() if len(keys) > 1]


def _network(spec: ModelSpec) -> Any:
    """Return the network on PyTorch's meta device: shapes, no data."""
    import torch

    from coat_deploy.network.coat import create_network

    with torch.device("meta"):
        return create_network(spec.architecture, spec.num_classes, **spec.model_args)


def is_unused(key: str, spec: ModelSpec) -> bool:
    """Tell whether a key of the authors' checkpoints belongs to a layer that is never run.

    Their network always makes a norm for each scale's output, and uses those whose class token
    the head reads: scales 2 to 4 in CoaT, scale 4 in CoaT-Lite, which also aggregates nothing.
    """
    module = key.partition(".")[0]
    if get_variant(spec.architecture).parallel_depth:
        return module == "norm1"
    return module in ("norm1", "norm2", "norm3", "aggregate")


def is_head(key: str) -> bool:
    """Tell whether a key belongs to the classifier."""
    return key.startswith("head.")
