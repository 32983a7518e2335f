import copy

import pytest
import torch

from coat_deploy.network.coat import create_network
from coat_deploy.network.fused import fuse as fusing
from coat_deploy.network.fused.fuse import FusedConvAttention, FusedSerialBlock, fuse, lower

FORMS = [
    ("coat_toy", {}),
    ("coat_lite_toy", {}),
    ("coat_toy", {"crpe": False}),
    ("coat_toy", {"cpe": False}),
    ("coat_toy", {"co_scale": "direct"}),
    ("coat_toy", {"co_scale": "none"}),
    ("coat_lite_toy", {"features": True}),
]


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 75, 90, generator=torch.Generator().manual_seed(0))


def outputs(network: torch.nn.Module, pixels: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        output = network(pixels)
    return output if torch.is_tensor(output) else torch.cat([x.flatten() for x in output])


def test_layer_norm_is_an_operator_where_nothing_compiles(pixels) -> None:
    network = fuse(create_network("coat_lite_toy", 10).eval(), feed_forward=False)
    with torch.profiler.profile() as seen:
        outputs(network, pixels)
    assert "coat::layer_norm" in {event.key for event in seen.key_averages()}
    targets = {str(node.target) for node in torch.export.export(network, (pixels,)).graph.nodes}
    assert "aten.layer_norm.default" in targets
    assert not [target for target in targets if "coat.layer_norm" in target]


@pytest.fixture(params=[1, 1 << 30], ids=["every FFN fused", "no FFN fused"])
def _tokens(request, monkeypatch) -> None:
    monkeypatch.setattr(fusing, "FFN_TOKENS", request.param)


@pytest.mark.usefixtures("_tokens")
@pytest.mark.parametrize(("name", "options"), FORMS)
def test_a_fused_network_computes_the_same(randomise, pixels, name, options) -> None:
    network = create_network(name, 10, **options).eval()
    randomise(network)
    expected = outputs(network, pixels)
    got = outputs(fuse(copy.deepcopy(network)), pixels)
    assert torch.allclose(got, expected, atol=1e-5)


def called(network: torch.nn.Module, pixels: torch.Tensor) -> list[str]:
    """Names of the fused operators that a run of `network` calls."""
    program = torch.export.export(network, (pixels,))
    names = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    return [name.split(".")[1] for name in names if name.startswith("coat.")]


@pytest.mark.slow
def test_every_block_calls_the_operators(pixels, monkeypatch) -> None:
    monkeypatch.setattr(fusing, "FFN_TOKENS", 1)
    names = called(fuse(create_network("coat_toy", 10)), pixels)
    # Four serial blocks and two parallel ones of three scales; one FFN is narrow enough.
    assert names.count("conv_attention") == names.count("encode_position") == 4 + 2 * 3
    assert names.count("feed_forward") == 1
    names = called(fuse(create_network("coat_toy", 10), feed_forward=False), pixels)
    assert "feed_forward" not in names


def test_direct_attention_stays_as_it_is(pixels) -> None:
    network = fuse(create_network("coat_toy", 10, co_scale="direct"))
    assert called(network, pixels).count("conv_attention") == 4
    assert isinstance(network.serial_blocks1[0], FusedSerialBlock)
    assert not isinstance(network.parallel_blocks[0].factoratt_crpe2, FusedConvAttention)


def test_blocks_of_a_scale_share_their_windows_and_keep_their_weights() -> None:
    network = create_network("coat_lite_toy", 10)
    weights = {name: weight.data_ptr() for name, weight in network.named_parameters()}
    fuse(network)
    first, second = network.serial_blocks2
    assert first.factoratt_crpe.crpe is second.factoratt_crpe.crpe
    kept = {name: weight.data_ptr() for name, weight in network.named_parameters()}
    packed = {name for name in weights if name.startswith(("cpe", "crpe"))}
    assert kept == {name: weights[name] for name in weights.keys() - packed}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_lowered_network_keeps_its_windows_and_agrees(randomise, pixels, dtype) -> None:
    network = create_network("coat_toy", 10).eval()
    randomise(network)
    expected = outputs(network, pixels)
    lowered = lower(fuse(copy.deepcopy(network)), dtype)
    assert {p.dtype for p in lowered.parameters()} == {dtype}
    assert {b.dtype for b in lowered.buffers()} == {torch.float32}
    got = outputs(lowered, pixels.to(dtype)).float()
    assert (got - expected).norm() / expected.norm() < (0.01 if dtype == torch.float16 else 0.08)


@pytest.mark.slow
def test_torch_compile_takes_a_fused_network(randomise, pixels) -> None:
    network = create_network("coat_lite_toy", 10).eval()
    randomise(network)
    expected = outputs(network, pixels)
    # Its code generator takes a minute; the graph that it would be given is made all the same.
    compiled = torch.compile(fuse(copy.deepcopy(network)), backend="aot_eager", fullgraph=True)
    assert torch.allclose(outputs(compiled, pixels), expected, atol=1e-5)
