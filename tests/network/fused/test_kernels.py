"""The kernels in Triton's interpreter, held against the paper in float64."""

import numpy as np
import pytest
import torch

from coat_deploy.network.variants import VARIANTS

WIDTHS = sorted({channels for variant in VARIANTS.values() for channels in variant.channels})
"""Channels of every scale of every variant: 2 to 64 a head, odd ones among them."""
BARS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-3}
ENCODED_BARS = BARS | {torch.bfloat16: 3e-3}
"""With windows bfloat16 is rounded twice, after them and at the end: each costs 1.7e-3 at most."""

every_type = pytest.mark.parametrize("dtype", BARS, ids=str)


@every_type
@pytest.mark.parametrize("channels", WIDTHS)
def test_conv_attention_is_the_papers(interpreted, draw, paper, error, channels, dtype) -> None:
    case = draw(channels, (3, 5), 1, dtype)
    got = interpreted("conv_attention", *case.arguments())
    assert got.dtype == dtype
    assert error(got, case.expected(paper)) < ENCODED_BARS[dtype]


@every_type
@pytest.mark.parametrize("channels", [16, 152])
def test_so_it_is_without_relative_positions(
    interpreted, draw, paper, error, channels, dtype
) -> None:
    case = draw(channels, (5, 7), 3, dtype)
    got = interpreted("conv_attention", *case.arguments(encode=False))
    assert error(got, case.expected(paper, encode=False)) < BARS[dtype]


@pytest.mark.parametrize("size", [(1, 1), (1, 9), (11, 2), (9, 13)])
def test_so_it_is_on_maps_of_any_size_and_several_images(
    interpreted, draw, paper, error, size
) -> None:
    case = draw(24, size, 3, torch.float32)
    expected = case.expected(paper)
    got = interpreted("conv_attention", *case.arguments())
    assert error(got, expected) < 1e-5
    assert error(got[:, :1], expected[:, :1]) < 1e-5  # the class token


@pytest.mark.parametrize(
    "constants",
    [
        {"WINDOW_LANES": 32},
        {"WINDOW_LANES": 64},
        {"MOST_ACROSS": 8},
        {"WINDOW_PROGRAMS": 1},
        {"LEAST_ROWS": 1},
        {"LEAST_ROWS": 3},
        {"ATTENDED": 16},
    ],
    ids=str,
)
def test_how_the_work_is_cut_changes_nothing(interpreted, draw, paper, error, constants) -> None:
    case = draw(40, (10, 11), 2, torch.float32)
    got = interpreted("conv_attention", *case.arguments(), **constants)
    assert error(got, case.expected(paper)) < 1e-5


@pytest.mark.parametrize(
    ("least", "splits"), [(16, 3), (8, 5)], ids=["all full", "two of them empty"]
)
def test_an_image_may_be_summed_in_chunks(interpreted, draw, paper, error, least, splits) -> None:
    case = draw(24, (5, 7), 2, torch.float32)
    constants = {"BLOCK": 16, "LEAST_CHUNK": least}
    contexts, _, got_splits = interpreted("context", case.qkv, 8, "ieee", **constants)
    assert got_splits == splits and len(contexts) == 2 * splits * 24 * 3
    got = interpreted("conv_attention", *case.arguments(), **constants)
    assert error(got, case.expected(paper)) < 1e-5


def test_large_keys_do_not_overflow(interpreted, draw, paper, error) -> None:
    case = draw(16, (5, 7), 1, torch.float32)
    case.qkv[:, :, 16:32] *= 300
    case.qkv[:, 20:, 16:32] += 9000
    got = interpreted("conv_attention", *case.arguments(), BLOCK=16, LEAST_CHUNK=16)
    shifted = case.qkv.clone()
    shifted[:, :, 16:32] -= shifted[:, :, 16:32].amax(dim=1, keepdim=True)  # softmax is the same
    assert error(got, type(case)(shifted, case.taps, case.bias, case.size).expected(paper)) < 1e-5


def test_a_value_that_is_no_number_spoils_its_image_only(interpreted, draw) -> None:
    case = draw(24, (3, 5), 3, torch.float32)
    case.qkv[1, 4, :] = torch.nan
    got = interpreted("conv_attention", *case.arguments())
    assert got.isnan().flatten(1).any(1).tolist() == [False, True, False]


@every_type
@pytest.mark.parametrize("channels", [16, 152, 216])
def test_layer_norm_is_pytorchs_in_float64(interpreted, error, channels, dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x = (2 + 0.01 * torch.randn(2, 45, channels, generator=generator)).to(dtype)
    weight, bias = (torch.randn(channels, generator=generator).to(dtype) for _ in range(2))
    exact = (t.double() for t in (weight, bias))
    expected = torch.nn.functional.layer_norm(x.double(), (channels,), *exact, eps=1e-3)
    got = interpreted("layer_norm", x, weight, bias, 1e-3)
    assert got.dtype == dtype
    assert error(got, expected.numpy()) < BARS[dtype]


@every_type
@pytest.mark.parametrize("channels", [16, 152])
@pytest.mark.parametrize("size", [(3, 5), (9, 10)])
def test_the_position_encoding_is_the_papers(
    interpreted, paper, error, channels, dtype, size
) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 1 + size[0] * size[1], channels, generator=generator).to(dtype)
    taps, bias = torch.randn(9, channels, generator=generator), torch.randn(channels)
    weight = taps.double().T.reshape(channels, 1, 3, 3).numpy()
    expected = [
        paper.on_image_tokens(
            image[0], paper.position_encoding(paper.to_map(image, size), weight, bias.numpy())
        )
        for image in x.double().numpy()
    ]
    got = interpreted("encode_position", x, taps, bias, size)
    assert error(got, np.stack(expected)) < BARS[dtype]
    assert torch.equal(got[:, 0], x[:, 0])


@every_type
@pytest.mark.parametrize(("channels", "ratio"), [(16, 2), (64, 8), (128, 4)])
def test_the_feed_forward_network_is_the_papers(
    interpreted, paper, error, channels, ratio, dtype
) -> None:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(dtype)

    x = (3 * torch.randn(2, 67, channels, generator=generator)).to(dtype)
    hidden = channels * ratio
    weights = (
        1 + random(channels), random(channels), random(hidden, channels), random(hidden),
        random(channels, hidden), random(channels),
    )  # fmt: skip
    names = ("n.weight", "n.bias", "fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    exact = {name: w.double().numpy() for name, w in zip(names, weights, strict=True)}
    scope = paper.Scope(exact)
    expected = [image + scope.ffn((scope / "n").norm(image)) for image in x.double().numpy()]
    got = interpreted("feed_forward", x, *weights, 1e-6)
    assert error(got, np.stack(expected)) < BARS[dtype]
