"""The operators as PyTorch sees them, and their plain form, which is theirs on a CPU."""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from coat_deploy.network.fused import operators, plain

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BARS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
ENCODED_BARS = BARS | {torch.bfloat16: 3e-3}
"""Kernels round bfloat16 once more after the windows."""


@pytest.fixture(params=["conv_attention", "conv_attention alone", "position", "feed_forward"])
def call(request, draw):
    """An operator, its plain form, and arguments for both."""
    case = draw(16, (3, 5), 2, torch.float32)
    x = case.qkv[:, :, :16].contiguous()
    if request.param.startswith("conv_attention"):
        arguments = case.arguments(encode=request.param == "conv_attention")
        return operators.conv_attention, plain.conv_attention, arguments
    if request.param == "position":
        encode = (x, case.taps[:9], case.bias, case.size)
        return operators.encode_position, plain.encode_position, encode
    generator = torch.Generator().manual_seed(0)
    shapes = ((16,), (16,), (32, 16), (32,), (16, 32), (16,))
    weights = [torch.randn(shape, generator=generator) for shape in shapes]
    return operators.feed_forward, plain.feed_forward, (x, *weights, 1e-6)


def flat(arguments):
    """The operators take height and width apart."""
    last = arguments[-1]
    return (*arguments[:-1], *last) if isinstance(last, tuple) else arguments


def test_an_operator_is_its_plain_form_on_a_cpu(call) -> None:
    operator, plainly, arguments = call
    assert torch.equal(operator(*flat(arguments)), plainly(*arguments))


def test_an_operator_passes_the_checks_of_pytorch(call) -> None:
    operator, _, arguments = call
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(operator, flat(arguments), test_utils=checks)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_shapes_and_types_are_known_without_computing(call, dtype, device) -> None:
    operator, _, arguments = call
    with FakeTensorMode():
        fakes = [
            torch.empty(a.shape, dtype=dtype, device=device) if torch.is_tensor(a) else a
            for a in flat(arguments)
        ]
        got = operator(*fakes)
    assert got.dtype == dtype and got.device.type == device
    assert got.shape == (2, 16, 16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("encode", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (5, 7), (9, 4)])
def test_the_plain_form_is_the_papers(draw, paper, error, dtype, encode, size) -> None:
    case = draw(40, size, 3, dtype)
    got = plain.conv_attention(*case.arguments(encode))
    assert got.dtype == dtype
    assert error(got, case.expected(paper, encode)) < BARS[dtype]


def test_the_plain_form_computes_float64_in_float64(draw, paper) -> None:
    case = draw(24, (5, 7), 2, torch.float64)
    got = plain.conv_attention(*case.arguments())
    assert np.abs(got.numpy() - case.expected(paper)).max() < 1e-12


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [24, 64, 128, 152, 216, 320, 512])
@pytest.mark.parametrize("size", [(7, 7), (28, 28), (19, 33)])
def test_a_gpu_computes_the_same(draw, error, channels, dtype, size) -> None:
    case = draw(channels, size, 3, dtype)

    def compare(operator, plainly, arguments, bars=BARS) -> None:
        def put(how):
            return [how(a) if torch.is_tensor(a) else a for a in arguments]

        got = operator(*flat(put(lambda a: a.cuda()))).cpu()
        assert error(got, plainly(*put(lambda a: a.double())).numpy()) < bars[dtype]

    for encode, bars in ((True, ENCODED_BARS), (False, BARS)):
        compare(operators.conv_attention, plain.conv_attention, case.arguments(encode), bars)
    x = case.qkv[:, :, :channels].contiguous()
    position = (x, case.taps[:9].contiguous(), case.bias, size)
    compare(operators.encode_position, plain.encode_position, position)
    generator = torch.Generator().manual_seed(0)
    norm = [torch.randn(channels, generator=generator).to(dtype) for _ in range(2)]

    def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float):
        return torch.nn.functional.layer_norm(x, (channels,), weight, bias, eps)

    compare(operators.layer_norm, layer_norm, (x, *norm, 1e-6))
    if channels in (64, 128):
        hidden = 8 * channels
        shapes = ((channels,), (channels,), (hidden, channels), (hidden,), (channels, hidden))
        weights = [
            (torch.randn(s, generator=generator) * s[-1] ** -0.5).to(dtype)
            for s in (*shapes, (channels,))
        ]
        compare(operators.feed_forward, plain.feed_forward, (x, *weights, 1e-6))
