"""Random crops of a whole batch: crop, mirror, rotate and shift in one resampling.

Photographs are stored squashed to one square, each with its aspect ratio, so that a batch is one
tensor; crops are drawn in the photographs' own geometry, and what was squashed is stretched back
by the resampling that crops anyway. Every random number is drawn on the CPU, by torch's default
generator: a seed means the same crops on every device, and no device is waited for.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from coat_deploy.spec import Size
from coat_deploy.train.recipe import Recipe

ATTEMPTS = 10
"""Boxes drawn for an image, of which the first that fits is taken; as many as torchvision."""
BOX_DRAWS = 2 * ATTEMPTS + 2
"""Random numbers an image that `place_boxes` needs."""


def random_crop(images: Tensor, aspects: Tensor, size: Size, recipe: Recipe) -> Tensor:
    """Return random resized crops, mirrored, rotated and shifted: (B, 3, H, W) float32, 0 to 1.

    `images` (B, 3, S, S) uint8 are photographs squashed to a square, `aspects` (B,) their width by
    height before. A crop's share of the photograph is uniform from `crop_min` to 1, its aspect
    ratio, in the photograph's own pixels, log-uniform within `crop_aspect` of W / H, either way;
    see `place_boxes` for what fits none. Inside its frame the crop then is rotated by up to
    `rotate` degrees and shifted by up to `shift` of each side, which brings in the photograph
    around it, and beyond the photograph its mirror image.

    Bilinear, from four pixels: a side shrinks by at most S / H, and where that is above 2 some
    pixels count for nothing. So store images no larger than twice the crop's side: at 1.5 times
    only crops of more than two thirds of a side shrink at all.

    Source: Szegedy et al. 2015, https://arxiv.org/abs/1409.4842; torchvision's RandomResizedCrop.
    """
    height, width = size
    batch = images.shape[0]
    draws = torch.rand(BOX_DRAWS + 4, batch).to(images.device)
    spread = (width / height / recipe.crop_aspect, width / height * recipe.crop_aspect)
    boxes = place_boxes(draws[:BOX_DRAWS], (recipe.crop_min, 1.0), spread, aspects.float())
    matrices = _compose(boxes, draws[BOX_DRAWS:], size, recipe)
    return warp(images.float(), matrices, size, "reflection").div_(255)


def place_boxes(
    draws: Tensor, share: tuple[float, float], aspect: tuple[float, float], image_aspects: Tensor
) -> Tensor:
    """Return a random box within each image, (4, B): left, top, width and height as its shares.

    `draws` (BOX_DRAWS, B) are uniform random numbers, `share` the least and most area as a share
    of the image's, `aspect` the least and most width by height. Of `ATTEMPTS` pairs of an area
    (uniform) and an aspect ratio (log-uniform) the first that fits into the image is placed
    anywhere in it. Where none fits, the box is the largest at the nearest aspect ratio, in the
    middle: torchvision's fallback.
    """
    areas = share[0] + (share[1] - share[0]) * draws[:ATTEMPTS]
    low, high = math.log(aspect[0]), math.log(aspect[1])
    # Of sides as shares of the image's: a box of the image's own aspect ratio has 1.
    ratios = (low + (high - low) * draws[ATTEMPTS : 2 * ATTEMPTS]).exp() / image_aspects
    sides = torch.stack([areas * ratios, areas / ratios]).sqrt()
    fits = (sides <= 1).all(0)
    first = fits.to(torch.uint8).argmax(0)
    drawn = sides.gather(1, first.expand(2, 1, -1))[:, 0]
    nearest = image_aspects.clamp(*aspect) / image_aspects
    largest = torch.stack([nearest, 1 / nearest]).clamp(max=1)
    fitted = fits.any(0)
    sides = torch.where(fitted, drawn, largest)
    corners = torch.where(fitted, draws[2 * ATTEMPTS :], 0.5) * (1 - sides)
    return torch.cat([corners, sides])


def warp(
    images: Tensor,
    matrices: Tensor,
    size: Size,
    padding: Literal["zeros", "border", "reflection"],
) -> Tensor:
    """Return images resampled, (B, C, *size): bilinear, in the images' own precision.

    `matrices` (B, 2, 3) lead from a place in the result (x, y, 1) to one in the image. Places run
    from -1 to 1 between the outer edges, right and down.
    """
    x, y = (
        (2 * torch.arange(side, device=images.device, dtype=matrices.dtype) + 1) / side - 1
        for side in (size[1], size[0])
    )
    # As `affine_grid`, but by additions: its matrix product is slower, and coarser wherever
    # products of float32 are allowed to be (autocast, TF32).
    along = matrices[:, :, 0, None] * x
    down = matrices[:, :, 1, None] * y + matrices[:, :, 2, None]
    grid = (along[:, :, None, :] + down[:, :, :, None]).permute(0, 2, 3, 1)
    return F.grid_sample(images, grid, "bilinear", padding, align_corners=False)


def _compose(boxes: Tensor, draws: Tensor, size: Size, recipe: Recipe) -> Tensor:
    """Return the matrices (B, 2, 3) from places in the result to places in the stored images.

    `draws` (4, B) are uniform random numbers: mirrored or not, angle, and shift in x and in y.
    """
    left, top, width, height = boxes
    signed = 2 * draws - 1
    mirror = torch.where(draws[0] < recipe.flip, -1.0, 1.0)
    angle = signed[1] * math.radians(recipe.rotate)
    x, y = signed[2:] * (2 * recipe.shift)  # a side is 2 long
    # A turn of pixels, which are square: in shares of the sides it takes their ratio along.
    stretch = size[0] / size[1]
    cos, right, down = angle.cos(), angle.sin() * stretch, angle.sin() / -stretch
    turned = torch.stack(
        [
            torch.stack([cos * mirror, right, -cos * x - right * y]),
            torch.stack([down * mirror, cos, -down * x - cos * y]),
        ]
    )  # (2, 3, B)
    matrices = turned * torch.stack([width, height])[:, None]
    matrices[:, 2] += 2 * torch.stack([left, top]) + torch.stack([width, height]) - 1
    return matrices.permute(2, 0, 1)
