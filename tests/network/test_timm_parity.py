"""With the same non-trivial weights, all eight variants equal timm's implementation."""

from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import pytest
import torch

from coat_deploy.network.coat import CoaT, create_network

TOLERANCE = 1e-5
NAMES = [
    "coat_lite_tiny",
    "coat_lite_mini",
    "coat_lite_small",
    "coat_lite_medium",
    "coat_lite_medium_384",
    "coat_tiny",
    "coat_mini",
    "coat_small",
]
SIDES = {"coat_lite_medium_384": 384}


@dataclass(frozen=True)
class Pair:
    """The same network twice, an image for it, and what timm makes of it."""

    ours: CoaT
    timms: torch.nn.Module
    pixels: torch.Tensor
    logits: torch.Tensor
    maps: list[torch.Tensor]


@pytest.fixture(scope="module", params=NAMES)
def pair(request: pytest.FixtureRequest, timm: ModuleType, randomise: Callable[..., None]) -> Pair:
    name = request.param
    side = SIDES.get(name, 224)
    with torch.device("meta"):  # no time is lost on weights that are overwritten
        ours = create_network(name).eval()
        timms = timm.create_model(name, pretrained=False, img_size=side).eval()
    randomise(ours.to_empty(device="cpu"))
    timms.load_state_dict(ours.state_dict(), strict=True, assign=True)
    pixels = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        tokens, maps = timms.forward_intermediates(pixels)
        logits = timms.forward_head(tokens)
    return Pair(ours, timms, pixels, logits, maps)


def test_state_dict_has_timms_keys_and_shapes(pair: Pair) -> None:
    ours = {key: tensor.shape for key, tensor in pair.ours.state_dict().items()}
    assert ours == {key: tensor.shape for key, tensor in pair.timms.state_dict().items()}


def test_parameters_are_as_many_as_timms(pair: Pair) -> None:
    ours, timms = (sum(p.numel() for p in n.parameters()) for n in (pair.ours, pair.timms))
    assert ours == timms


@torch.no_grad()
def test_logits_equal_timms(pair: Pair) -> None:
    assert pair.logits.std() > 0.1  # or the weights would hide a difference
    assert (pair.ours(pair.pixels) - pair.logits).abs().max() <= TOLERANCE


@torch.no_grad()
def test_feature_maps_equal_timms(pair: Pair) -> None:
    """No norm follows the maps: the tolerance is relative to their largest value."""
    with torch.device("meta"):
        network = create_network(pair.ours.variant.name, features=True).eval()
    weights = pair.ours.state_dict()
    network.load_state_dict({key: weights[key] for key in network.state_dict()}, assign=True)
    maps = network(pair.pixels)
    assert [m.shape for m in maps] == [m.shape for m in pair.maps]
    for actual, wanted in zip(maps, pair.maps, strict=True):
        assert (actual - wanted).abs().max() <= TOLERANCE * wanted.abs().max()
