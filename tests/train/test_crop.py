import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from coat_deploy.train.crop import BOX_DRAWS, place_boxes, random_crop
from coat_deploy.train.recipe import Recipe

PLAIN = Recipe().replace({"crop_min": 1.0, "crop_aspect": 1.0, "flip": 0.0})
"""All of a square image, upright."""


def photographs(*shape):
    """Smooth pictures, so that an interpolation's details weigh little."""
    small = torch.rand(shape[0], 3, 6, 6, generator=torch.Generator().manual_seed(0)) * 255
    return F.interpolate(small, shape[1:], mode="bicubic").clamp(0, 255).to(torch.uint8)


def square(count):
    return torch.ones(count)


def draw(share, aspect, image_aspects):
    torch.manual_seed(0)
    draws = torch.rand(BOX_DRAWS, len(image_aspects))
    return place_boxes(draws, share, aspect, image_aspects)


def always_draw(monkeypatch, value):
    monkeypatch.setattr(torch, "rand", lambda *shape: torch.full(shape, value))


def pillow(image):
    return Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())


def from_pillow(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255


def test_small_boxes_have_uniform_areas_log_uniform_aspects_and_uniform_places():
    left, top, width, height = draw((0.1, 0.3), (0.5, 2.0), square(40_000))
    evenly = torch.linspace(0, 1, 11)[1:-1]

    def deciles(values, low, high):
        return ((values - low) / (high - low)).quantile(evenly)

    for values in (
        deciles(width * height, 0.1, 0.3),
        deciles((width / height).log(), math.log(0.5), math.log(2)),
        deciles(left / (1 - width), 0, 1),
        deciles(top / (1 - height), 0, 1),
    ):
        torch.testing.assert_close(values, evenly, atol=0.015, rtol=0)


@pytest.mark.parametrize("aspect", [0.4, 1.0, 1.5])
def test_boxes_are_distributed_as_those_of_timm(timm, aspect):
    theirs_of = timm.data.transforms.RandomResizedCropAndInterpolation.get_params
    random.seed(0)
    # So many pixels that rounding to them counts for nothing.
    image = Image.new("1", (round(4000 * aspect), 4000))
    theirs = np.array([theirs_of(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(4000)])
    left, top, width, height = draw((0.08, 1.0), (3 / 4, 4 / 3), torch.full((40_000,), aspect))
    theirs = theirs.T / np.resize([image.height, image.width], (4, 1))
    ours = torch.stack([top, left, height, width]).double().numpy()
    evenly = np.linspace(0, 1, 11)[1:-1]
    for mine, reference in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(
            np.quantile(mine, evenly), np.quantile(reference, evenly), atol=0.03
        )


def test_boxes_lie_within_their_images():
    torch.manual_seed(1)
    aspects = torch.rand(10_000).mul(6).sub(3).exp()
    boxes = draw((0.08, 1.0), (3 / 4, 4 / 3), aspects)
    left, top, width, height = boxes
    assert boxes.min() >= 0
    assert (left + width).max() <= 1 + 1e-6
    assert (top + height).max() <= 1 + 1e-6
    in_pixels = aspects * width / height
    assert in_pixels.min() >= 3 / 4 - 1e-5 and in_pixels.max() <= 4 / 3 + 1e-5


def test_where_no_box_fits_the_largest_at_the_nearest_aspect_is_taken_from_the_middle():
    wide, tall = draw((1.0, 1.0), (3 / 4, 4 / 3), torch.tensor([4.0, 0.25])).T
    torch.testing.assert_close(wide, torch.tensor([1 / 3, 0, 1 / 3, 1]))
    torch.testing.assert_close(tall, torch.tensor([0, 1 / 3, 1, 1 / 3]))


@pytest.mark.parametrize("size", [(24, 24), (32, 20), (48, 48), (80, 64)])
def test_a_crop_of_everything_is_a_bilinear_resize(size):
    images = photographs(3, 48, 48)
    aspects = torch.full((3,), size[1] / size[0])
    expected = F.interpolate(images.float(), size, mode="bilinear", align_corners=False)
    result = random_crop(images, aspects, size, PLAIN)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, expected / 255, atol=1e-4, rtol=0)


def test_a_flip_mirrors_left_and_right():
    images = photographs(2, 20, 20)
    result = random_crop(images, square(2), (20, 20), PLAIN.replace({"flip": 1.0}))
    torch.testing.assert_close(result, images.flip(-1) / 255, atol=1e-4, rtol=0)


def test_the_share_of_mirrored_images_is_the_recipes():
    images = torch.arange(8, dtype=torch.uint8).expand(4000, 3, 8, 8)
    torch.manual_seed(0)
    result = random_crop(images, square(4000), (8, 8), PLAIN.replace({"flip": 0.3}))
    mirrored = (result[:, 0, 0, 0] > result[:, 0, 0, -1]).float().mean()
    assert mirrored == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize("squashed", [0.5, 2.0])
def test_a_circle_in_a_squashed_photograph_comes_out_as_a_circle(squashed):
    place = (torch.arange(128) + 0.5) / 128 - 0.5
    wide, high = max(1.0, squashed), max(1.0, 1 / squashed)
    radii = ((place * wide) ** 2 + (place[:, None] * high) ** 2).sqrt()
    images = ((radii < 0.3) * 255).to(torch.uint8).expand(64, 3, 128, 128)
    recipe = PLAIN.replace({"crop_min": 0.45})
    torch.manual_seed(0)
    result = random_crop(images, torch.full((64,), squashed), (96, 96), recipe)[:, 0] > 0.5
    across, down = result.any(1), result.any(2)
    whole = ~(across[:, 0] | across[:, -1] | down[:, 0] | down[:, -1])
    assert whole.sum() > 10
    difference = across.sum(1)[whole] - down.sum(1)[whole]
    assert difference.abs().max() <= 2


def test_a_quarter_turn_is_that_of_torch(monkeypatch):
    images = photographs(2, 32, 32)
    always_draw(monkeypatch, 1.0)
    result = random_crop(images, square(2), (32, 32), PLAIN.replace({"rotate": 90.0}))
    torch.testing.assert_close(result, images.rot90(-1, (-2, -1)) / 255, atol=1e-3, rtol=0)


def test_rotation_keeps_the_shape_of_things_in_an_oblong_crop(monkeypatch):
    images, size, aspects = photographs(1, 96, 96), (48, 96), torch.tensor([2.0])
    plain = random_crop(images, aspects, size, PLAIN)[0]
    always_draw(monkeypatch, 1.0)
    result = random_crop(images, aspects, size, PLAIN.replace({"rotate": 25.0}))[0]
    expected = from_pillow(pillow(plain).rotate(-25, Image.Resampling.BILINEAR))
    middle = (slice(None), slice(14, 34), slice(28, 68))  # nothing from outside comes so far
    torch.testing.assert_close(result[middle], expected[middle], atol=0.02, rtol=0)


def test_a_shift_is_a_share_of_the_side_and_brings_in_the_photograph_around(monkeypatch):
    images = photographs(1, 32, 32)
    always_draw(monkeypatch, 1.0)
    result = random_crop(images, square(1), (32, 32), PLAIN.replace({"shift": 0.25}))
    expected = images / 255
    torch.testing.assert_close(result[..., 8:, 8:], expected[..., :-8, :-8], atol=1e-4, rtol=0)
    mirrored = expected[..., :8, :8].flip(-1, -2)
    torch.testing.assert_close(result[..., :8, :8], mirrored, atol=1e-4, rtol=0)


def test_turns_and_shifts_reach_their_limits_both_ways_and_no_further():
    dot = torch.zeros(4000, 3, 65, 65, dtype=torch.uint8)
    dot[:, :, 28:37, 44:53] = 255  # 16 pixels right of the middle
    recipe = PLAIN.replace({"rotate": 30.0})
    torch.manual_seed(0)
    turned = random_crop(dot, square(4000), (65, 65), recipe)[:, 0]
    place = torch.arange(65) - 32.0
    mass = turned.sum((1, 2))
    x, y = (turned.sum(1) @ place) / mass, (turned.sum(2) @ place) / mass
    degrees = torch.atan2(y, x).rad2deg()
    assert degrees.abs().max() <= 30.5
    assert degrees.mean().abs() < 1
    assert degrees.std() == pytest.approx(60 / math.sqrt(12), rel=0.05)


def test_the_seed_decides_the_crops():
    images = photographs(4, 32, 32)
    recipe = Recipe().replace({"rotate": 10.0, "shift": 0.1})

    def crop(seed):
        torch.manual_seed(seed)
        return random_crop(images, square(4), (24, 24), recipe)

    assert torch.equal(crop(3), crop(3))
    assert not torch.equal(crop(3), crop(4))


def test_no_pixel_leaves_the_range():
    images = torch.randint(0, 2, (64, 3, 16, 16), dtype=torch.uint8) * 255
    recipe = Recipe().replace({"rotate": 45.0, "shift": 0.5})
    result = random_crop(images, square(64), (24, 24), recipe)
    assert result.min() >= 0 and result.max() <= 1 + 1e-6
