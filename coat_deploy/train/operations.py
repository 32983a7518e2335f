"""The operations of RandAugment on batches, each image at a strength of its own.

They are the fifteen of timm's increasing set (`rand-...-inc1`), the authors', with its range of
strengths and Pillow's meaning of each: kornia's functions for that purpose, but for two. (Its
`auto.RandAugment` is another thing: one draw for a whole batch, brightness that adds where
Pillow's multiplies, contrast that multiplies where Pillow's keeps the mean, solarising that grows
weaker with the magnitude.) Pixels are not rounded to whole levels in between.

Source: Cubuk et al. 2020, https://arxiv.org/abs/1909.13719; `timm.data.auto_augment`.
"""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from coat_deploy.errors import BackendMissing

Operation = Callable[[Tensor, Tensor], Tensor]
"""Images (N, 3, H, W) from 0 to 1 and numbers (N,) to such images."""
Motion = Callable[[Tensor, float], Tensor]
"""Strengths (N,) and the images' height by width to matrices (N, 2, 3) for `crop.warp`."""


def adjustments() -> Mapping[str, Operation]:
    """Return what changes colours by a factor, by name: 1 leaves them, 0 takes all away.

    Raises: BackendMissing without kornia.
    """
    try:
        from kornia import enhance
    except ImportError as error:
        raise BackendMissing(
            f"augmentation: kornia cannot be imported ({error}). "
            'Run: pip install "coat-deploy[train]"'
        ) from error
    return {
        "brightness": enhance.adjust_brightness_accumulative,
        "contrast": enhance.adjust_contrast_with_mean_subtraction,
        "saturation": enhance.adjust_saturation_with_gray_subtraction,
        "sharpness": enhance.sharpness,
    }


def recolourings() -> Mapping[str, Operation]:
    """Return RandAugment's operations on colours, by name, of strengths from -1 to 1.

    Those without a direction go by the size of the strength, three by nothing.
    Raises: BackendMissing without kornia.
    """
    factors = {name: _by_strength(adjust) for name, adjust in adjustments().items()}
    from kornia import enhance

    return factors | {
        "auto_contrast": lambda images, _: auto_contrast(images),
        "equalise": lambda images, _: enhance.equalize(images),
        "invert": lambda images, _: enhance.invert(images),
        # Not down to 0 bits, which would leave a black image.
        "posterise": lambda images, s: enhance.posterize(images, 4 - _whole(s, 4).clamp(max=3)),
        "solarise": lambda images, s: enhance.solarize(images, (256 - _whole(s, 256)) / 255),
        "solarise_add": lambda images, s: solarise_add(images, _whole(s, 110) / 255),
    }


def auto_contrast(images: Tensor) -> Tensor:
    """Return each channel of each image stretched to 0 to 1; one of a single value stays.

    kornia's would turn that channel black.
    """
    low, high = images.amin((-2, -1), keepdim=True), images.amax((-2, -1), keepdim=True)
    flat = low == high
    return torch.where(flat, images, (images - low) / torch.where(flat, 1.0, high - low))


def solarise_add(images: Tensor, added: Tensor) -> Tensor:
    """Return images (N, ...) with `added` (N,) on every value of the darker half.

    kornia's `solarize` with `additions` adds to all values and inverts the brighter half.
    """
    brighter = (images + added.view(-1, 1, 1, 1)).clamp(max=1)
    return torch.where(images < 128 / 255, brighter, images)


def _by_strength(adjust: Operation) -> Operation:
    """Return the adjustment by a factor from 0.1 to 1.9."""
    return lambda images, strengths: adjust(images, (1 + 0.9 * strengths).clamp(min=0.1))


def _whole(strengths: Tensor, most: int) -> Tensor:
    return (strengths.abs() * most).int()


def _rotate(strengths: Tensor, stretch: float) -> Tensor:
    """Up to 30 degrees, about the centre."""
    matrices, angles = _identities(strengths), strengths * math.radians(30)
    matrices[:, 0, 0] = matrices[:, 1, 1] = angles.cos()
    matrices[:, 0, 1], matrices[:, 1, 0] = -angles.sin() * stretch, angles.sin() / stretch
    return matrices


def _shear_x(strengths: Tensor, stretch: float) -> Tensor:
    """Up to 0.3 pixels a row, the top edge held, as Pillow counts from there."""
    matrices = _identities(strengths)
    matrices[:, 0, 1] = matrices[:, 0, 2] = 0.3 * strengths * stretch
    return matrices


def _shear_y(strengths: Tensor, stretch: float) -> Tensor:
    """Up to 0.3 pixels a column, the left edge held."""
    matrices = _identities(strengths)
    matrices[:, 1, 0] = matrices[:, 1, 2] = 0.3 * strengths / stretch
    return matrices


def _translate_x(strengths: Tensor, stretch: float) -> Tensor:
    """Up to 0.45 of the width."""
    matrices = _identities(strengths)
    matrices[:, 0, 2] = 2 * 0.45 * strengths
    return matrices


def _translate_y(strengths: Tensor, stretch: float) -> Tensor:
    """Up to 0.45 of the height."""
    matrices = _identities(strengths)
    matrices[:, 1, 2] = 2 * 0.45 * strengths
    return matrices


def _identities(strengths: Tensor) -> Tensor:
    return torch.eye(2, 3).repeat(len(strengths), 1, 1)


MOTIONS: Mapping[str, Motion] = {
    "rotate": _rotate,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
}
"""RandAugment's operations on places, by name, of strengths from -1 to 1."""
