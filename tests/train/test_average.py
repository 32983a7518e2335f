import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from coat_deploy.train.average import Average
from coat_deploy.train.schedule import average_decay

UPDATES = 25


def moved(network, step):
    """Change the parameters as a step of an optimiser would."""
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator))


def bits(network):
    return {key: value.clone() for key, value in network.state_dict().items()}


def same(found, expected):
    return all(torch.equal(found[key], expected[key]) for key in expected)


def test_a_constant_decay_gives_the_bits_of_torchs_average(toys):
    """Up to 0.1 the decay has no warm-up."""
    network = toys.network("coat_toy")
    theirs = AveragedModel(network, multi_avg_fn=get_ema_multi_avg_fn(0.1))
    theirs.update_parameters(network)  # its first update copies
    ours = Average(network, 0.1)
    for step in range(UPDATES):
        moved(network, step)
        ours.update()
        theirs.update_parameters(network)
    with ours.in_place():
        assert same(bits(network), bits(theirs.module))


def test_the_warm_up_gives_timms_average(timm):
    """Of a network without shared parameters: timm's moves each of those once for every key."""
    network = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    ours = Average(network, 0.6)
    theirs = timm.utils.ModelEmaV3(
        network, decay=0.6, use_warmup=True, warmup_gamma=9, warmup_power=1
    )
    for step in range(UPDATES):
        moved(network, step)
        ours.update()
        theirs.update(network, step=step + 2)
    expected = bits(theirs.module)
    with ours.in_place():
        for key, value in bits(network).items():
            torch.testing.assert_close(value, expected[key], rtol=1e-6, atol=1e-6)


def test_the_average_is_the_formula_in_float64():
    network = nn.Linear(2, 1, bias=False)
    average, expected = Average(network, 0.9), network.weight.double()
    for step in range(UPDATES):
        moved(network, step)
        average.update()
        decay = average_decay(step, 0.9)
        expected = decay * expected + (1 - decay) * network.weight.double()
    torch.testing.assert_close(average.tensors[0].double(), expected, rtol=1e-6, atol=1e-6)


def test_in_place_gives_the_weights_back_to_the_bit(toys):
    network = toys.network()
    average, first = Average(network, 0.9), bits(network)
    moved(network, 0)
    weights = bits(network)
    with average.in_place():
        assert same(bits(network), first)
    assert same(bits(network), weights)


def test_in_place_gives_the_weights_back_when_the_body_raises(toys):
    network = toys.network()
    average = Average(network, 0.9)
    moved(network, 0)
    weights = bits(network)
    with pytest.raises(KeyboardInterrupt), average.in_place():
        raise KeyboardInterrupt
    assert same(bits(network), weights)


def test_parameters_stay_the_same_objects_so_that_the_optimiser_keeps_them(toys):
    network = toys.network()
    before = [(id(p), p.data_ptr()) for p in network.parameters()]
    average = Average(network, 0.9)
    average.update()
    with average.in_place():
        pass
    assert [(id(p), p.data_ptr()) for p in network.parameters()] == before


def test_no_gradient_remembers_the_average(toys):
    network = toys.network()
    average = Average(network, 0.9)
    average.update()
    assert not any(tensor.requires_grad for tensor in average.tensors)
    with average.in_place():
        assert all(parameter.is_leaf for parameter in network.parameters())


def test_parameters_that_blocks_share_are_averaged_once(toys):
    network = toys.network("coat_toy")
    average = Average(network, 0.9)
    moved(network, 0)
    average.update()
    assert len(average.tensors) == len({p.data_ptr() for p in network.parameters()})
    with average.in_place():
        block = network.parallel_blocks[0]
        assert block.mlp2 is block.mlp3 is block.mlp4


def test_without_a_decay_there_is_no_average(toys):
    network = toys.network()
    average = Average(network, 0.0)
    moved(network, 0)
    weights = bits(network)
    average.update()
    with average.in_place():
        assert same(bits(network), weights)
    average.load({}, 0)
    assert average.tensors == []


def test_buffers_are_no_surprise():
    with pytest.raises(AssertionError, match="buffers"):
        Average(nn.BatchNorm2d(3), 0.9)
