"""RandAugment's operations against timm's, which are Pillow's."""

import sys

import numpy as np
import pytest
import torch
from PIL import Image

from coat_deploy.errors import BackendMissing
from coat_deploy.train.crop import warp
from coat_deploy.train.operations import MOTIONS, adjustments, auto_contrast, recolourings

TIMM_NAMES = {
    "auto_contrast": "AutoContrast",
    "equalise": "Equalize",
    "invert": "Invert",
    "posterise": "PosterizeIncreasing",
    "solarise": "SolarizeIncreasing",
    "solarise_add": "SolarizeAdd",
    "saturation": "ColorIncreasing",
    "contrast": "ContrastIncreasing",
    "brightness": "BrightnessIncreasing",
    "sharpness": "SharpnessIncreasing",
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
}
GREY = 128
SIZE = (48, 72)


@pytest.fixture(scope="module")
def picture():
    """A smooth picture that leaves out the darkest and the brightest values."""
    values = np.random.default_rng(0).integers(20, 230, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(values).resize(SIZE[::-1], Image.Resampling.BICUBIC)


def to_tensor(picture):
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 255


def ours(name, images, strength):
    strengths = torch.tensor([strength])
    if name in MOTIONS:
        matrices = MOTIONS[name](strengths, SIZE[0] / SIZE[1])
        return warp(images - GREY / 255, matrices, SIZE, "zeros") + GREY / 255
    return recolourings()[name](images, strengths)


def theirs(timm, name, picture, strength, monkeypatch):
    known = sys.modules["timm.data.auto_augment"]
    sign = 1 if strength > 0 else -1
    monkeypatch.setattr(known, "_randomly_negate", lambda value: sign * value)
    level = known.LEVEL_TO_ARG[TIMM_NAMES[name]]
    arguments = level(abs(strength) * 10, {}) if level else ()
    if not isinstance(arguments, tuple):
        arguments = (arguments,)
    outside = {"fillcolor": (GREY,) * 3, "resample": Image.Resampling.BILINEAR}
    return known.NAME_TO_OP[TIMM_NAMES[name]](
        picture, *arguments, **(outside if name in MOTIONS else {})
    )


def test_the_operations_are_those_of_the_authors_training(timm):
    known = sys.modules["timm.data.auto_augment"]._RAND_INCREASING_TRANSFORMS
    assert sorted(TIMM_NAMES.values()) == sorted(known)
    assert {*recolourings(), *MOTIONS} == set(TIMM_NAMES)


@pytest.mark.parametrize("strength", [0.33, 0.9, -0.9])
@pytest.mark.parametrize("name", TIMM_NAMES)
def test_operation_is_that_of_timm(timm, name, strength, picture, monkeypatch):
    expected = to_tensor(theirs(timm, name, picture, strength, monkeypatch))
    difference = (ours(name, to_tensor(picture), strength) - expected).abs() * 255
    # Pillow rounds and truncates to whole levels, in some operations twice.
    assert difference.mean() < 1
    if name not in MOTIONS:
        assert difference.max() < 2
    else:  # it also draws a hard line between the image and its outside, ours is half a pixel soft
        assert difference.flatten().quantile(0.94) < 2


def test_images_of_a_batch_are_changed_each_at_its_own_strength(picture):
    images, strengths = to_tensor(picture).repeat(3, 1, 1, 1), torch.tensor([-0.9, 0.2, 0.7])
    for operation in recolourings().values():
        alone = [operation(images[:1], strength[None]) for strength in strengths]
        torch.testing.assert_close(operation(images, strengths), torch.cat(alone))


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "sharpness"])
def test_a_factor_of_one_changes_nothing(name, picture):
    images = to_tensor(picture)
    torch.testing.assert_close(adjustments()[name](images, torch.ones(1)), images)


def test_posterising_leaves_at_least_one_bit(picture):
    assert len(ours("posterise", to_tensor(picture), 1.0).unique()) == 2


def test_auto_contrast_leaves_a_channel_of_one_value():
    images = torch.rand(1, 3, 4, 4)
    images[:, 1] = 0.7
    result = auto_contrast(images)
    torch.testing.assert_close(result[:, 1], images[:, 1])
    assert result[:, 0].min() == 0 and result[:, 0].max() == 1


def test_without_kornia_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "kornia", None)
    with pytest.raises(BackendMissing, match=r'pip install "coat-deploy\[train\]"'):
        adjustments()
