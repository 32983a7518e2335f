"""What is computed by hand in training on a CPU equals the formulas, and timm's gradients."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from coat_deploy.network import cpu_training
from coat_deploy.network.attention import FactorizedConvAttention
from coat_deploy.network.blocks import Mlp
from coat_deploy.network.coat import CoaT, PatchEmbed, create_network
from coat_deploy.network.position import ConvPosEnc, ConvRelPosEnc
from coat_deploy.network.variants import get_variant

TOLERANCE = 1e-11
SIZE = (5, 6)
WINDOWS = ((3, 2), (5, 3), (7, 3))


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every FFN go in pieces, several of them and the last one smaller."""
    monkeypatch.setattr(cpu_training, "PIECE_ELEMENTS", 7 * 96)
    monkeypatch.setattr(cpu_training, "PIECES_WORTH_IT", 0)


def formulas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_training, "suits", lambda _: False)


def attention(crpe: bool = True) -> FactorizedConvAttention:
    return FactorizedConvAttention(24, 8, ConvRelPosEnc(3, WINDOWS) if crpe else None)


class OnMap(torch.nn.Module):
    """A part of the network that is told the size of its map."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> Any:
        return self.inner(x, SIZE)


class Tokens(PatchEmbed):
    """Patch embedding without the size that it returns beside."""

    def forward(self, x: torch.Tensor) -> Any:
        tokens, size = super().forward(x)
        assert size == (x.shape[2] // 2, x.shape[3] // 2)
        return tokens


TOKENS = (3, 1 + SIZE[0] * SIZE[1], 24)
PARTS: dict[str, tuple[Callable[[], torch.nn.Module], tuple[int, ...]]] = {
    "patch embedding": (lambda: Tokens(5, 24, 2), (3, 5, 8, 6)),
    "patch embedding of a size that leaves pixels over": (lambda: Tokens(5, 24, 2), (3, 5, 7, 9)),
    "CPE": (lambda: OnMap(ConvPosEnc(24)), TOKENS),
    "conv-attention": (lambda: OnMap(attention()), TOKENS),
    "conv-attention without CRPE": (lambda: OnMap(attention(crpe=False)), TOKENS),
    "FFN": (lambda: Mlp(24, 4), TOKENS),
}


def outcome(part: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Return the output and the gradients, of the input and of every parameter."""
    x = x.clone().requires_grad_()
    part.zero_grad()
    y = part(x)
    generator = torch.Generator().manual_seed(2)
    y.backward(torch.randn(y.shape, dtype=y.dtype, generator=generator))
    grads = [parameter.grad for parameter in part.parameters()]
    assert x.grad is not None and all(grad is not None and grad.any() for grad in grads)
    return [y.detach(), x.grad, *(grad.clone() for grad in grads if grad is not None)]


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", PARTS)
def test_a_part_equals_its_formula(
    name: str, randomise: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = PARTS[name]
    part = make().double()
    randomise(part)
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    by_hand = outcome(part, x)
    formulas(monkeypatch)
    for got, expected in zip(by_hand, outcome(part, x), strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < TOLERANCE


def test_gradients_of_conv_attention_are_those_of_finite_differences() -> None:
    torch.manual_seed(0)
    crpe = ConvRelPosEnc(1, ((3, 1), (5, 1))).double()
    qkv = torch.randn(2, 1 + 2 * 3, 3 * 2, dtype=torch.float64, requires_grad=True)

    def attend(qkv: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return cpu_training.conv_attention(qkv, 2, 0.7, crpe.windows(), (2, 3))

    assert torch.autograd.gradcheck(attend, (qkv, *crpe.parameters()))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy"])
def test_all_gradients_of_a_network_equal_those_of_its_formulas(
    name: str, randomise: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = create_network(name, 5).double()
    randomise(network)
    pixels = images(2, (75, 50))
    by_hand = gradients(network, pixels)
    formulas(monkeypatch)
    assert_same(by_hand, gradients(network, pixels))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["coat_nano", "coat_lite_nano"])
def test_all_gradients_equal_timms(
    name: str, timm: ModuleType, randomise: Callable[..., None]
) -> None:
    ours = create_network(name, 5).double()
    randomise(ours)
    form = get_variant(name).timm
    assert form is not None
    theirs = timm.create_model(form.architecture, num_classes=5, img_size=64, **form.args).double()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    pixels = images(2, (64, 64))
    assert_same(gradients(ours, pixels), gradients(theirs, pixels))


def images(batch: int, size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, 3, *size, dtype=torch.float64, generator=generator)


def gradients(network: torch.nn.Module, pixels: torch.Tensor) -> dict[str, torch.Tensor]:
    network.train().zero_grad()
    cross_entropy(network(pixels), torch.arange(len(pixels))).backward()
    named = network.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Hold gradients against others, each relative to the largest of its parameter."""
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        largest = gradient.abs().max().item()
        assert (got[name] - gradient).abs().max() <= 1e-10 * max(largest, 1e-6), name


# Where


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Note which parts are computed by hand."""
    called: list[str] = []
    for name in ("embed_patches", "encode_position", "conv_attention", "feed_forward"):
        function = getattr(cpu_training, name)

        def noted(*arguments: Any, name: str = name, function: Any = function) -> Any:
            called.append(name)
            return function(*arguments)

        monkeypatch.setattr(cpu_training, name, noted)
    yield called


def test_inference_goes_by_the_formulas(calls: list[str]) -> None:
    with torch.no_grad():
        create_network("coat_toy")(torch.zeros(1, 3, 64, 64))
    assert calls == []


def test_other_devices_go_by_the_formulas(calls: list[str]) -> None:
    with torch.device("meta"):
        create_network("coat_toy")(torch.zeros(1, 3, 64, 64))
    assert calls == []


def test_only_large_ffns_go_in_pieces(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network, pixels = create_network("coat_lite_toy"), torch.zeros(1, 3, 64, 64)
    network(pixels)
    assert {"embed_patches", "encode_position", "conv_attention"} == set(calls)
    largest = 257 * 32  # tokens and hidden channels of scale 1
    monkeypatch.setattr(cpu_training, "PIECE_ELEMENTS", largest // cpu_training.PIECES_WORTH_IT)
    calls.clear()
    network(pixels)
    assert calls.count("feed_forward") == 1


def test_a_large_ffn_keeps_no_hidden_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept.append(x.numel())
        return x

    ffn, x = Mlp(24, 4), torch.randn(3, 50, 24, requires_grad=True)
    for pieces_worth_it, largest in ((1 << 30, 3 * 50 * 96), (0, 3 * 50 * 24)):
        monkeypatch.setattr(cpu_training, "PIECES_WORTH_IT", pieces_worth_it)
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            ffn(x)
        assert max(kept) == largest


# Together with what trainings use


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("name", ["coat_toy", "coat_lite_toy"])
def test_bfloat16_gives_nearly_the_gradients_of_float32(
    name: str, randomise: Callable[..., None]
) -> None:
    network = create_network(name, 5)
    randomise(network)
    pixels = images(4, (64, 64)).float()
    exact = gradients(network, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        rough = gradients(network, pixels)
    assert rough.keys() == exact.keys()
    assert all(gradient.dtype == torch.float32 for gradient in rough.values())
    one, other = (torch.cat([g.flatten() for g in grads.values()]) for grads in (exact, rough))
    assert torch.cosine_similarity(one, other, dim=0) > 0.99


def test_a_compiled_network_trains_to_the_same_gradients(randomise: Callable[..., None]) -> None:
    network = create_network("coat_lite_toy", 5).double()
    randomise(network)
    pixels = images(2, (64, 64))
    expected = gradients(network, pixels)
    network.compile(backend="aot_eager", fullgraph=True)
    assert_same(gradients(network, pixels), expected)


def test_frozen_parameters_get_no_gradients_and_the_others_theirs() -> None:
    network: CoaT = create_network("coat_lite_toy", 5).double()
    pixels = images(2, (64, 64))
    expected = gradients(network, pixels)
    frozen = {name for name, _ in network.named_parameters() if "1" in name.split(".")[0]}
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name not in frozen)
        parameter.grad = None
    got = gradients(network, pixels)
    assert_same(got, {name: g for name, g in expected.items() if name not in frozen})
