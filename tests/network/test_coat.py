"""What the network promises beside its formulas: sizes, sharing, training, copies."""

import copy
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch

from coat_deploy.errors import UsageError
from coat_deploy.network.blocks import DropPath
from coat_deploy.network.coat import CoaT, create_network
from coat_deploy.network.macs import count, count_macs, count_parameters
from coat_deploy.network.variants import get_variant
from coat_deploy.spec import ModelSpec, Preprocess

TOYS = ["coat_toy", "coat_lite_toy"]
PUBLISHED = {  # input side, parameters (M), GMACs
    "coat_lite_tiny": (224, "5.72", "1.60"),
    "coat_lite_mini": (224, "11.01", "2.00"),
    "coat_lite_small": (224, "19.84", "3.96"),
    "coat_lite_medium": (224, "44.57", "9.81"),
    "coat_lite_medium_384": (384, "44.57", "28.73"),
    "coat_tiny": (224, "5.50", "4.35"),
    "coat_mini": (224, "10.34", "6.82"),
    "coat_small": (224, "21.69", "12.61"),
}

Make = Callable[..., CoaT]


@pytest.fixture
def make(randomise: Callable[..., None]) -> Make:
    """Return a function that makes a toy in float64 with weights that say something."""

    def create(name: str, num_classes: int = 7, **options: Any) -> CoaT:
        network = create_network(name, num_classes, **options).double().eval()
        randomise(network)
        return network

    return create


def images(batch: int = 1, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator)


def gradients(network: CoaT) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)  # of stochastic depth
    network.train().zero_grad()
    logits = network(images(2))
    assert isinstance(logits, torch.Tensor)
    logits.square().sum().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


# Parameters and MACs


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name: str) -> None:
    side, params_m, gmacs = PUBLISHED[name]
    with torch.device("meta"):
        network = create_network(name)
    assert f"{count_parameters(network) / 1e6:.2f}" == params_m
    assert f"{count_macs(network, (side, side)) / 1e9:.2f}" == gmacs


@pytest.mark.parametrize("name", ["coat_lite_nano", "coat_nano"])
def test_a_nano_has_the_parameters_and_macs_of_the_table(name: str) -> None:
    with torch.device("meta"):
        network = create_network(name)
    counted = count_parameters(network) / 1e6, count_macs(network, (64, 64)) / 1e9
    assert counted == pytest.approx(get_variant(name).counted, rel=0.002)
    assert counted[0] == pytest.approx(1, rel=0.15)


def test_a_spec_is_counted_with_its_classes_and_switches() -> None:
    how = Preprocess((64, 64))
    spec = ModelSpec("coat_toy", 7, 0, how, model_args={"crpe": False})
    network = create_network("coat_toy", 7, crpe=False)
    assert count(spec, (64, 96)) == (count_parameters(network), count_macs(network, (64, 96)))


def test_counting_macs_leaves_the_network_as_it_was() -> None:
    network = create_network("coat_toy").train()
    before = {name: p.clone() for name, p in network.named_parameters()}
    count_macs(network, (64, 64))
    assert network.training
    assert all(torch.equal(p, before[name]) for name, p in network.named_parameters())


def test_attention_is_linear_in_the_number_of_pixels() -> None:
    network = create_network("coat_lite_toy")
    once, fourfold = count_macs(network, (256, 256)), count_macs(network, (512, 512))
    assert fourfold / once == pytest.approx(4, rel=0.01)


# Sharing


@pytest.mark.parametrize("name", TOYS)
def test_blocks_of_a_scale_share_one_cpe_and_one_crpe(name: str) -> None:
    network: Any = create_network(name)
    for s in (1, 2, 3, 4):
        for block in getattr(network, f"serial_blocks{s}"):
            assert block.cpe is getattr(network, f"cpe{s}")
            assert block.factoratt_crpe.crpe is getattr(network, f"crpe{s}")


def test_parallel_blocks_share_the_serial_crpe_and_one_ffn() -> None:
    network: Any = create_network("coat_toy")
    for block in network.parallel_blocks:
        assert block.mlp2 is block.mlp3 is block.mlp4
        for s in (2, 3, 4):
            assert getattr(block, f"factoratt_crpe{s}").crpe is getattr(network, f"crpe{s}")


def test_a_shared_parameter_is_counted_once() -> None:
    network = create_network("coat_toy")
    state = network.state_dict(keep_vars=True)
    distinct = {id(parameter): parameter.numel() for parameter in state.values()}
    assert count_parameters(network) == sum(distinct.values())
    assert count_parameters(network) < sum(parameter.numel() for parameter in state.values())


# Shapes


@torch.no_grad()
@pytest.mark.parametrize("size", [(224, 320), (250, 190), (33, 47), (32, 32), (32, 300)])
@pytest.mark.parametrize("name", TOYS)
def test_any_size_gives_maps_of_its_floored_quotients(
    make: Make, name: str, size: tuple[int, int]
) -> None:
    maps = make(name, features=True)(images(1, size))
    shapes = [tuple(feature_map.shape) for feature_map in maps]
    strides = (4, 8, 16, 32)
    channels = get_variant(name).channels
    assert shapes == [
        (1, c, size[0] // stride, size[1] // stride)
        for c, stride in zip(channels, strides, strict=True)
    ]
    assert all(feature_map.isfinite().all() for feature_map in maps)


@torch.no_grad()
@pytest.mark.parametrize("co_scale", ["interpolation", "direct"])
def test_pixels_that_fill_no_patch_are_ignored(make: Make, co_scale: str) -> None:
    network = make("coat_toy", co_scale=co_scale)
    pixels = images(1, (67, 65))
    assert torch.equal(network(pixels), network(pixels[:, :, :64, :64]))


@pytest.mark.parametrize("size", [(31, 64), (64, 16)])
def test_an_image_below_the_minimum_is_refused_with_its_size(size: tuple[int, int]) -> None:
    with pytest.raises(UsageError) as caught:
        create_network("coat_toy")(torch.zeros(1, 3, *size))
    message = str(caught.value)
    assert f"{size[0]}x{size[1]}" in message
    assert "coat_toy" in message
    assert "32 pixels" in message


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_ten_classes_give_ten_logits(make: Make, name: str) -> None:
    assert make(name, num_classes=10)(images(2)).shape == (2, 10)


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_no_classes_give_the_vector_the_head_reads(make: Make, name: str) -> None:
    network, headless = make(name), make(name, num_classes=0)
    weights = network.state_dict()
    headless.load_state_dict({k: v for k, v in weights.items() if not k.startswith("head.")})
    vector = headless(images(2))
    assert vector.shape == (2, headless.variant.num_features)
    assert torch.equal(network.head(vector), network(images(2)))


@torch.no_grad()
@pytest.mark.parametrize("co_scale", ["interpolation", "direct"])
def test_an_image_of_a_batch_does_not_see_the_others(make: Make, co_scale: str) -> None:
    network = make("coat_toy", co_scale=co_scale)
    batch = images(3, (75, 50))
    singly = torch.cat([network(image[None]) for image in batch])
    assert (network(batch) - singly).abs().max() < 1e-12


# Options


def test_an_unknown_variant_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"Did you mean 'coat_mini'\?"):
        create_network("coat_minni")


def test_an_unknown_co_scale_strategy_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match=r"'directly'.*Did you mean 'direct'\?"):
        create_network("coat_toy", co_scale="directly")


@pytest.mark.parametrize("part", ["cpe", "crpe"])
def test_what_is_left_out_has_no_parameters(part: str) -> None:
    keys = create_network("coat_toy", **{part: False}).state_dict()
    assert part not in {name.rstrip("1234") for key in keys for name in key.split(".")}


def test_a_backbone_has_no_head_and_no_final_norm() -> None:
    backbone = create_network("coat_toy", features=True).state_dict()
    whole = create_network("coat_toy").state_dict()
    left = {key.split(".")[0] for key in whole.keys() - backbone.keys()}
    assert left == {"norm2", "norm3", "norm4", "aggregate", "head"}
    assert not backbone.keys() - whole.keys()


def test_a_fresh_network_starts_as_the_authors_do() -> None:
    torch.manual_seed(0)
    network: Any = create_network("coat_lite_tiny")
    assert network.head.weight.std().item() == pytest.approx(0.02, rel=0.02)
    assert network.serial_blocks2[0].mlp.fc1.bias.count_nonzero() == 0
    assert torch.equal(network.norm4.weight, torch.ones(320))
    assert network.cls_token1.std().item() == pytest.approx(0.02, rel=0.4)


# Training


@pytest.mark.parametrize("name", TOYS)
def test_every_parameter_gets_a_gradient(make: Make, name: str) -> None:
    network = make(name)
    found = gradients(network)
    expected = {n for n, _ in network.named_parameters()}
    if name == "coat_lite_toy":
        # CRPE acts on image tokens, and after the one block of scale 4 nothing reads those.
        expected = {n for n in expected if not n.startswith("crpe4")}
    assert {n for n, gradient in found.items() if gradient.any()} == expected


@pytest.mark.parametrize("drop_path", [0.0, 0.5])
@pytest.mark.parametrize("name", TOYS)
def test_gradient_checkpointing_gives_the_same_gradients(
    make: Make, name: str, drop_path: float
) -> None:
    plain = gradients(make(name, drop_path=drop_path))
    again = gradients(make(name, drop_path=drop_path, gradient_checkpointing=True))
    assert plain.keys() == again.keys()
    assert max((plain[n] - again[n]).abs().max().item() for n in plain) < 1e-12


@pytest.mark.parametrize(("checkpointing", "calls"), [(False, 1), (True, 2)])
def test_gradient_checkpointing_computes_blocks_twice(
    make: Make, checkpointing: bool, calls: int
) -> None:
    network: Any = make("coat_toy", gradient_checkpointing=checkpointing)
    blocks = [network.serial_blocks1[0], network.parallel_blocks[1]]
    seen: list[Any] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, *_: seen.append(block))
    gradients(network)
    assert [seen.count(block) for block in blocks] == [calls, calls]


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_training_mode_changes_nothing_without_stochastic_depth(make: Make, name: str) -> None:
    network = make(name)
    assert torch.equal(network.eval()(images()), network.train()(images()))


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_stochastic_depth_acts_in_training_only(make: Make, name: str) -> None:
    torch.manual_seed(0)
    plain, stochastic = make(name), make(name, drop_path=0.5)
    assert torch.equal(stochastic(images()), plain(images()))
    assert not torch.equal(stochastic.train()(images()), plain(images()))


@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy"])
def test_every_block_has_the_same_rate_of_stochastic_depth_as_in_timm(
    name: str, timm: ModuleType
) -> None:
    form = get_variant(name).timm
    assert form is not None
    theirs = timm.create_model(form.architecture, drop_path_rate=0.3, **form.args)
    rates = [m.drop_prob for m in theirs.modules() if isinstance(m, timm.layers.DropPath)]
    ours = create_network(name, drop_path=0.3)
    assert [m.probability for m in ours.modules() if isinstance(m, DropPath)] == rates
    assert set(rates) == {0.3}


def test_stochastic_depth_drops_whole_images_and_keeps_the_expectation() -> None:
    torch.manual_seed(0)
    x, branch = torch.full((20_000, 3, 2), 7.0), torch.ones(20_000, 3, 2)
    dropped = DropPath(0.2).train()(x, branch) - x
    assert torch.equal(dropped, dropped[:, :1, :1].expand_as(dropped))
    assert set(dropped.unique().tolist()) == {0.0, 1.25}
    assert dropped.mean().item() == pytest.approx(1, abs=0.02)


# Copies


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_a_deep_copy_computes_the_same_and_still_shares(make: Make, name: str) -> None:
    network = make(name)
    expected = network(images())
    copied: Any = copy.deepcopy(network)
    assert torch.equal(copied(images()), expected)
    assert copied.serial_blocks2[0].cpe is copied.cpe2
    copied.cpe2.proj.weight.zero_()
    assert not torch.equal(copied(images()), expected)
    assert torch.equal(network(images()), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", TOYS)
def test_a_state_dict_carries_the_whole_network(make: Make, name: str) -> None:
    network = make(name)
    fresh = create_network(name, num_classes=7).double().eval()
    fresh.load_state_dict(network.state_dict(), strict=True)
    assert torch.equal(fresh(images()), network(images()))
