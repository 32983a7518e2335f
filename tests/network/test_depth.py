"""The layer of each parameter, as layer-wise learning rates need it."""

from typing import Any

import pytest
import torch

from coat_deploy.network.coat import create_network
from coat_deploy.network.depth import layer_count, layer_of
from coat_deploy.network.variants import VARIANTS, Variant, get_variant

TINY = get_variant("coat_lite_tiny")  # serial depths (2, 2, 2, 2)
NANO = get_variant("coat_nano")  # serial depths (1, 1, 1, 1) and 2 parallel blocks
KEYS = [
    (TINY, "patch_embed1.proj.weight", 0),
    (TINY, "patch_embed1.norm.bias", 0),
    (TINY, "cls_token1", 0),
    (TINY, "cpe1.proj.weight", 1),
    (TINY, "crpe1.conv_list.2.bias", 1),
    (TINY, "serial_blocks1.0.norm1.weight", 1),
    (TINY, "serial_blocks1.1.mlp.fc2.weight", 2),
    (TINY, "serial_blocks1.1.cpe.proj.weight", 1),
    (TINY, "serial_blocks1.1.factoratt_crpe.crpe.conv_list.0.weight", 1),
    (TINY, "serial_blocks1.1.factoratt_crpe.qkv.weight", 2),
    (TINY, "patch_embed2.proj.weight", 3),
    (TINY, "cls_token3", 5),
    (TINY, "cpe4.proj.bias", 7),
    (TINY, "serial_blocks4.1.norm2.bias", 8),
    (TINY, "norm4.weight", 9),
    (TINY, "head.weight", 9),
    (NANO, "serial_blocks4.0.mlp.fc1.bias", 4),
    (NANO, "parallel_blocks.0.norm12.weight", 5),
    (NANO, "parallel_blocks.0.factoratt_crpe3.crpe.conv_list.1.weight", 3),
    (NANO, "parallel_blocks.1.factoratt_crpe3.qkv.bias", 6),
    (NANO, "parallel_blocks.1.mlp4.fc1.weight", 6),
    (NANO, "norm2.weight", 7),
    (NANO, "aggregate.weight", 7),
    (NANO, "head.bias", 7),
]


@pytest.mark.parametrize(("variant", "key", "layer"), KEYS)
def test_a_parameter_is_in_the_layer_of_its_block(variant: Variant, key: str, layer: int) -> None:
    assert layer_of(key, variant) == layer


def parameters(variant: Variant) -> dict[str, list[str]]:
    """Return the keys of every parameter, which are several where blocks share it."""
    with torch.device("meta"):
        network: Any = create_network(variant.name)
    groups: dict[int, list[str]] = {}
    for key, parameter in network.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(key)
    return {keys[0]: keys for keys in groups.values()}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_shared_parameter_has_one_layer_whatever_its_key(name: str) -> None:
    variant = get_variant(name)
    for keys in parameters(variant).values():
        assert len({layer_of(key, variant) for key in keys}) == 1, keys


@pytest.mark.parametrize("name", VARIANTS)
def test_every_layer_has_parameters_and_there_are_no_others(name: str) -> None:
    variant = get_variant(name)
    layers = {layer_of(key, variant) for key in parameters(variant)}
    assert layers == set(range(layer_count(variant)))


@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy", "coat_nano"])
def test_no_parameter_acts_before_its_layer(name: str) -> None:
    """What a block reads comes from layers up to its own: so layers are in order of depth."""
    variant = get_variant(name)
    network: Any = create_network(name)
    order: list[int] = []

    def note(key: str) -> Any:
        return lambda *_: order.append(layer_of(f"{key}.weight", variant))

    for key, module in network.named_modules():
        if key.split(".")[-1].startswith(("norm", "fc")):
            module.register_forward_hook(note(key))
    with torch.no_grad():
        network(torch.zeros(1, 3, 64, 64))
    assert order == sorted(order)
    assert len(order) > layer_count(variant)
