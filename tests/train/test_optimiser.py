import importlib

import pytest
import torch

from coat_deploy.network.depth import layer_count, layer_of
from coat_deploy.network.variants import get_variant
from coat_deploy.train.optimiser import create_optimiser, decays, parameters, set_rate

TOYS = ["coat_lite_toy", "coat_toy"]


def groups(optimiser, network):
    """Of each parameter's name: its weight decay and scale."""
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return {
        names[id(parameter)]: (group["weight_decay"], group["scale"])
        for group in optimiser.param_groups
        for parameter in group["params"]
    }


def created(toys, variant, **fields):
    network = toys.network(variant)
    return create_optimiser(network, get_variant(variant), toys.recipe(**fields)), network


def authors_exceptions(network):
    """What the authors' and timm's CoaT names in `no_weight_decay`."""
    return {f"cls_token{s}" for s in (1, 2, 3, 4)} & dict(network.named_parameters()).keys()


@pytest.mark.parametrize("variant", TOYS)
def test_what_decays_is_what_decays_in_timm(toys, timm, variant):
    optimiser, network = created(toys, variant, weight_decay=0.05)
    theirs = importlib.import_module("timm.optim").param_groups_weight_decay(
        network, 0.05, no_weight_decay_list=authors_exceptions(network)
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    expected = {names[id(p)]: group["weight_decay"] for group in theirs for p in group["params"]}
    found = {name: decay for name, (decay, _) in groups(optimiser, network).items()}
    assert found == expected
    assert {0.0, 0.05} == set(found.values())


def test_the_authors_class_exempts_the_same_tokens(timm):
    with torch.device("meta"):
        theirs = timm.create_model("coat_tiny", pretrained=False)
    tokens = {name for name, _ in theirs.named_parameters() if name.startswith("cls_token")}
    assert theirs.no_weight_decay() == tokens
    assert not any(decays(name, torch.zeros(1, 1, 8)) for name in tokens)


@pytest.mark.parametrize("variant", TOYS)
@pytest.mark.parametrize("layer_decay", [1.0, 0.7])
def test_every_parameter_is_in_one_group(toys, variant, layer_decay):
    optimiser, network = created(toys, variant, layer_decay=layer_decay)
    found = [id(parameter) for parameter in parameters(optimiser)]
    assert sorted(found) == sorted(id(parameter) for parameter in network.parameters())


def test_without_layer_decay_every_layer_learns_at_the_full_rate(toys):
    optimiser, network = created(toys, "coat_lite_toy")
    assert len(optimiser.param_groups) == 2
    assert {scale for _, scale in groups(optimiser, network).values()} == {1.0}


@pytest.mark.parametrize("variant", TOYS)
def test_layers_learn_at_the_rates_that_timms_layer_decay_gives(toys, timm, variant):
    """timm's rule (the same formula and rule of decay) over our layers, given as its groups."""
    optimiser, network = created(toys, variant, layer_decay=0.7, weight_decay=0.05)
    optim = importlib.import_module("timm.optim")
    layers = {name: layer_of(name, network.variant) for name, _ in network.named_parameters()}
    network.group_matcher = lambda coarse: lambda name: layers[name]
    theirs = optim.param_groups_layer_decay(
        network, 0.05, no_weight_decay_list=authors_exceptions(network), layer_decay=0.7
    )
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    expected = {
        names[id(p)]: (group["weight_decay"], group["lr_scale"])
        for group in theirs
        for p in group["params"]
    }
    found = groups(optimiser, network)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("variant", TOYS)
def test_the_head_learns_at_the_full_rate_and_the_pixels_end_least(toys, variant):
    optimiser, network = created(toys, variant, layer_decay=0.5)
    scales = {name: scale for name, (_, scale) in groups(optimiser, network).items()}
    assert scales["head.weight"] == scales["head.bias"] == scales["norm4.weight"] == 1.0
    least = 0.5 ** (layer_count(network.variant) - 1)
    assert scales["patch_embed1.proj.weight"] == scales["cls_token1"] == least
    assert min(scales.values()) == least


def test_set_rate_gives_every_group_its_share(toys):
    optimiser, _ = created(toys, "coat_lite_toy", layer_decay=0.5)
    set_rate(optimiser, 0.125)
    assert [g["lr"] for g in optimiser.param_groups] == [
        0.125 * g["scale"] for g in optimiser.param_groups
    ]
    assert max(g["lr"] for g in optimiser.param_groups) == 0.125


def test_steps_are_those_of_adamw_written_out_in_float64(toys):
    """Loshchilov and Hutter's algorithm 2, by hand, over three steps."""
    optimiser, network = created(toys, "coat_lite_toy", weight_decay=0.1, layer_decay=0.5)
    names = ["head.weight", "cls_token2", "patch_embed1.norm.bias"]
    chosen = {name: dict(network.named_parameters())[name] for name in names}
    shares = groups(optimiser, network)
    weights = {name: p.detach().double().clone() for name, p in chosen.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in weights.items()} for _ in range(2))
    for step in range(1, 4):
        generator = torch.Generator().manual_seed(step)
        for parameter in network.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        rate = 0.1 / step
        set_rate(optimiser, rate)
        optimiser.step()
        for name, w in weights.items():
            gradient = chosen[name].grad.double()
            decay, scale = shares[name]
            w -= rate * scale * decay * w
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient**2
            unbiased = first[name] / (1 - 0.9**step), second[name] / (1 - 0.999**step)
            w -= rate * scale * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
    for name, w in weights.items():
        torch.testing.assert_close(chosen[name].detach().double(), w, rtol=1e-5, atol=1e-6)
