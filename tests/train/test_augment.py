import random
import sys

import numpy as np
import pytest
import torch

from coat_deploy.errors import BackendMissing
from coat_deploy.images import normalise
from coat_deploy.spec import IMAGENET_MEAN, IMAGENET_STD
from coat_deploy.train.augment import Augment, Jitter, RandAugment, erase
from coat_deploy.train.recipe import PRESETS, Recipe, get_preset

CPU = torch.device("cpu")
PLAIN = Recipe().replace(
    {"crop_min": 1.0, "crop_aspect": 1.0, "flip": 0.0, "rand_augment": 0, "erase": 0.0}
)
"""Nothing on."""


def augment(recipe, size=(32, 32), **changes):
    return Augment(recipe.replace(changes), size, IMAGENET_MEAN, IMAGENET_STD, CPU)


def noise(*shape):
    values = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    return values.to(torch.uint8)


def seeded(function, *arguments, seed=0):
    torch.manual_seed(seed)
    return function(*arguments)


def test_with_nothing_on_images_are_only_normalised():
    images = noise(4, 3, 32, 32)
    expected = normalise(images.numpy(), IMAGENET_MEAN, IMAGENET_STD)
    result = augment(PLAIN)(images, torch.ones(4))
    np.testing.assert_allclose(result.numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("value", [0, 255])
def test_extreme_pixels_become_the_extremes_of_the_normalised_range(value):
    images = torch.full((2, 3, 48, 48), value, dtype=torch.uint8)
    result = seeded(augment(PLAIN, crop_min=0.1, flip=0.5, rotate=20.0), images, torch.ones(2))
    expected = (value / 255 - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)
    torch.testing.assert_close(result, expected.view(1, 3, 1, 1).expand_as(result))


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_stays_finite_and_within_the_normalised_range(preset):
    images, aspects = noise(16, 3, 48, 48), torch.rand(16) + 0.5
    result = seeded(augment(get_preset(preset), (32, 40)), images, aspects)
    assert result.shape == (16, 3, 32, 40) and result.dtype == torch.float32
    white, black = (
        ((end - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_STD)).view(3, 1)
        for end in (1, 0)
    )
    values = result.transpose(0, 1).flatten(1)
    assert (values <= white + 1e-4).all() and (values >= black - 1e-4).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_the_seed_alone_decides_a_batch_whatever_came_before(preset):
    images, aspects = noise(16, 3, 48, 48), torch.rand(16) + 0.5
    fresh, used = augment(get_preset(preset)), augment(get_preset(preset))
    for seed in range(3):
        seeded(used, images[:7], aspects[:7], seed=seed)
    assert torch.equal(
        seeded(fresh, images, aspects, seed=9), seeded(used, images, aspects, seed=9)
    )


def test_two_seeds_make_two_batches_and_the_stored_images_stay():
    images, aspects = noise(8, 3, 48, 48), torch.ones(8)
    kept = images.clone()
    call = augment(get_preset("imagenet"))
    assert not torch.equal(
        seeded(call, images, aspects, seed=1), seeded(call, images, aspects, seed=2)
    )
    assert torch.equal(images, kept)


def test_autocast_around_it_changes_nothing():
    images, aspects = noise(16, 3, 48, 48), torch.ones(16)
    call = augment(get_preset("imagenet"), jitter=0.2)
    plain = seeded(call, images, aspects)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(seeded(call, images, aspects), plain)


@pytest.mark.parametrize("channels_last", [True, False])
def test_images_are_laid_out_as_the_recipe_says(channels_last):
    result = augment(PLAIN, channels_last=channels_last)(noise(4, 3, 48, 48), torch.ones(4))
    assert result.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert result.is_contiguous() != channels_last


def test_kornia_is_only_needed_by_what_uses_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    augment(PLAIN, erase=0.5, rotate=5.0)
    for changes in ({"jitter": 0.2}, {"rand_augment": 1}):
        with pytest.raises(BackendMissing):
            augment(PLAIN, **changes)


def rand_augment(images, rounds, magnitude=9.0):
    recipe = PLAIN.replace({"rand_augment": rounds, "rand_augment_magnitude": magnitude})
    return seeded(RandAugment(recipe, torch.full((1, 3, 1, 1), 0.5)), images.clone())


def test_an_operation_takes_place_in_half_of_the_cases():
    # No operation leaves this image, of few values and not all of the range, as it is.
    image = (torch.arange(48).view(3, 4, 4) % 7) / 10 + 0.1
    images = image.expand(3000, 3, 4, 4)
    for rounds in (1, 3):
        same = (rand_augment(images, rounds) == images).flatten(1).all(1).float().mean()
        assert same == pytest.approx(0.5**rounds, abs=0.04)


def test_every_image_of_a_batch_has_operations_of_its_own():
    images = (noise(1, 3, 16, 16) / 400 + 0.1).expand(64, 3, 16, 16)
    assert len(rand_augment(images, 2).flatten(1).unique(dim=0)) > 30


def test_rand_augment_at_a_magnitude_of_almost_nothing_hardly_moves_an_image():
    """Only the three operations without a strength and the solarising ones may change much."""
    images = (torch.linspace(0.1, 0.4, 16).expand(16, 16)).expand(512, 3, 16, 16)
    weak, strong = (
        (rand_augment(images, 1, magnitude) - images).abs().mean() for magnitude in (0.0, 9.0)
    )
    assert weak < strong / 2


def test_what_a_motion_brings_in_has_the_fill_colour():
    result = rand_augment(torch.full((512, 3, 16, 16), 0.25), 1)
    low, high = result.amin((1, 2, 3)), result.amax((1, 2, 3))
    # Whatever changes colours leaves an image of one value one of one value.
    moved = high - low > 1e-6
    assert 0.1 < moved.float().mean() < 0.25  # half of 5 in 15, and a few within a pixel
    torch.testing.assert_close(low[moved], torch.full_like(low[moved], 0.25))
    torch.testing.assert_close(high[moved], torch.full_like(high[moved], 0.5))


def test_jitter_multiplies_brightness_by_factors_within_its_range():
    # Neither contrast nor saturation changes a grey image.
    images = torch.full((4000, 3, 2, 2), 0.5)
    factors = seeded(Jitter(0.2), images)[:, 0, 0, 0] / 0.5
    evenly = torch.linspace(0, 1, 11)
    torch.testing.assert_close(factors.quantile(evenly), 0.8 + 0.4 * evenly, atol=0.02, rtol=0)


def test_jitter_changes_contrast_and_saturation_too():
    red = torch.zeros(200, 3, 2, 2)
    red[:, 0] = 0.5
    halves = torch.full((200, 3, 2, 2), 0.3)
    halves[..., 0] = 0.6
    purity, contrast = seeded(Jitter(0.2), red), seeded(Jitter(0.2), halves)
    assert (purity[:, 1] / purity[:, 0]).std() > 0.01
    assert (contrast[..., 0] / contrast[..., 1]).std() > 0.05


def erased(share, count=4000, size=(32, 48)):
    images = torch.ones(count, 3, *size)
    seeded(erase, images, share)
    assert torch.equal(images.unique(), torch.tensor([0.0, 1.0]))
    assert torch.equal(images.amin(1), images.amax(1))
    return images[:, 0] == 0


def test_a_share_of_the_images_gets_one_erased_rectangle():
    mask = erased(0.25)
    assert mask.any(2).any(1).float().mean() == pytest.approx(0.25, abs=0.03)
    rectangle = mask.any(1)[:, None, :] & mask.any(2)[:, :, None]
    assert torch.equal(mask, rectangle)
    edges = mask.any(1).int().diff(dim=1).abs().sum(1)
    assert edges.max() <= 2


def test_erased_rectangles_are_distributed_as_those_of_timm(timm):
    mask = erased(1.0, 3000)
    images = torch.ones(3000, 3, 32, 48)
    random.seed(0)
    timm.data.random_erasing.RandomErasing(probability=1.0, device="cpu")(images)
    theirs = images[:, 0] == 0
    evenly = torch.linspace(0, 1, 9)[1:-1]
    for summary, close in (
        (lambda m: m.float().mean((1, 2)), 0.02),
        (lambda m: m.any(1).float().mean(1), 0.05),
        (lambda m: m.any(2).float().mean(1), 0.05),
        (lambda m: m.any(1).float().argmax(1) / 48, 0.05),
        (lambda m: m.any(2).float().argmax(1) / 32, 0.05),
    ):
        ours, expected = summary(mask).quantile(evenly), summary(theirs).quantile(evenly)
        torch.testing.assert_close(ours, expected, atol=close, rtol=0)
