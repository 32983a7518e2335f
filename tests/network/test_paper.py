"""The network equals the paper's formulas, read plainly in NumPy float64, to 1e-10."""

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from coat_deploy.network.coat import create_network
from coat_deploy.network.variants import get_variant

TOLERANCE = 1e-10
SIZES = [(64, 64), (75, 50), (33, 47), (32, 32)]
TOYS = ["coat_toy", "coat_lite_toy"]
ABLATIONS = [
    ("coat_toy", {"co_scale": "direct"}),
    ("coat_toy", {"co_scale": "none"}),
    ("coat_toy", {"cpe": False}),
    ("coat_toy", {"crpe": False}),
    ("coat_toy", {"cpe": False, "crpe": False, "co_scale": "direct"}),
    ("coat_lite_toy", {"cpe": False}),
    ("coat_lite_toy", {"crpe": False}),
]


@pytest.fixture
def both(paper: ModuleType, randomise: Callable[..., None]) -> Callable[..., Any]:
    """Return a function that makes a network in float64 and the paper with the same weights."""

    def make(name: str, *, features: bool = False, **switches: Any) -> tuple[Any, Any]:
        network = create_network(name, num_classes=7, features=features, **switches)
        network = network.double().eval()
        randomise(network)
        weights = {key: tensor.numpy() for key, tensor in network.state_dict().items()}
        variant = get_variant(name)
        reading = paper.Paper(weights, variant.serial_depths, variant.parallel_depth, **switches)
        return network, reading

    return make


def image(size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(1, 3, *size, dtype=torch.float64, generator=generator)


def assert_equal(actual: torch.Tensor, expected: np.ndarray) -> None:
    assert tuple(actual.shape) == expected.shape
    assert np.abs(actual.numpy() - expected).max() < TOLERANCE


@torch.no_grad()
def assert_same_logits(network: Any, reading: Any, size: tuple[int, int]) -> None:
    pixels = image(size)
    assert_equal(network(pixels)[0], reading.logits(pixels[0].numpy()))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", TOYS)
def test_logits_equal_the_paper(both: Any, name: str, size: tuple[int, int]) -> None:
    assert_same_logits(*both(name), size)


def test_logits_of_a_large_oblong_image_equal_the_paper(both: Any) -> None:
    assert_same_logits(*both("coat_toy"), (250, 190))


@pytest.mark.parametrize(("name", "switches"), ABLATIONS)
def test_logits_of_an_ablation_equal_the_paper(
    both: Any, name: str, switches: dict[str, Any]
) -> None:
    assert_same_logits(*both(name, **switches), (75, 50))


@torch.no_grad()
@pytest.mark.parametrize("co_scale", ["interpolation", "direct", "none"])
@pytest.mark.parametrize("name", TOYS)
def test_feature_maps_equal_the_paper(both: Any, name: str, co_scale: str) -> None:
    network, reading = both(name, features=True, co_scale=co_scale)
    pixels = image((75, 50))
    maps, expected = network(pixels), reading.features(pixels[0].numpy())
    assert len(maps) == len(expected) == 4
    for actual, wanted in zip(maps, expected, strict=True):
        assert_equal(actual[0], wanted)


@torch.no_grad()
@pytest.mark.parametrize(("name", "switches"), ABLATIONS)
def test_leaving_a_part_out_changes_the_logits(
    both: Any, name: str, switches: dict[str, Any]
) -> None:
    """So that an ablation which silently did nothing could not pass for one."""
    whole, _ = both(name)
    ablated, _ = both(name, **switches)
    ablated.load_state_dict(
        {key: whole.state_dict()[key] for key in ablated.state_dict()}, strict=True
    )
    pixels = image((64, 64))
    assert (whole(pixels) - ablated(pixels)).abs().max() > 0.01
