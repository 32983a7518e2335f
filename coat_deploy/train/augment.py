"""Augmentation of whole batches, on the device that holds them, as a recipe says.

Every random number is drawn on the CPU, by torch's default generator, and nothing is kept between
calls: seeded before a batch, the batch is the same whatever came before it, on every device.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from coat_deploy.spec import Size
from coat_deploy.train.crop import BOX_DRAWS, place_boxes, random_crop, warp
from coat_deploy.train.operations import MOTIONS, Operation, adjustments, recolourings
from coat_deploy.train.recipe import Recipe

MAGNITUDE_SPREAD = 0.5
"""Standard deviation of the magnitudes of RandAugment's operations, of 10: timm's `mstd0.5`."""
TAKES_PLACE = 0.5
"""Probability that an operation drawn by RandAugment takes place: timm's."""
ERASED_SHARE = (0.02, 1 / 3)
"""Least and most share of an image that is erased, as in timm."""
ERASED_ASPECT = (0.3, 1 / 0.3)
"""Least and most width by height of what is erased, as in timm."""

Step = Callable[[Tensor], Tensor]


class Augment:
    """Turns stored images into the network's input.

    In this order: crop, mirror, rotation and shift (`crop.random_crop`), RandAugment, colour
    jitter, normalisation, erasing. What the recipe leaves at 0 is left out.
    `size` is the result's (height, width); `mean` and `std` are of values from 0 to 1.
    Raises: BackendMissing without kornia, where the recipe needs it.
    """

    def __init__(
        self,
        recipe: Recipe,
        size: Size,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
    ):
        self._recipe, self._size, self._device = recipe, size, device
        self._mean, self._std = (
            torch.tensor(colour, dtype=torch.float32, device=device).view(1, 3, 1, 1)
            for colour in (mean, std)
        )
        self._steps: list[Step] = []
        if recipe.rand_augment:
            self._steps.append(RandAugment(recipe, self._mean.clamp(0, 1)))
        if recipe.jitter:
            self._steps.append(Jitter(recipe.jitter))

    @torch.no_grad()
    def __call__(self, images: Tensor, aspects: Tensor) -> Tensor:
        """Return (B, 3, H, W) float32, normalised, laid out channels last if the recipe says so.

        `images` (B, 3, S, S) uint8 and `aspects` (B,), their width by height, lie on the device.
        """
        with torch.autocast(self._device.type, enabled=False):
            augmented = random_crop(images, aspects, self._size, self._recipe)
            for step in self._steps:
                augmented = step(augmented)
            augmented.sub_(self._mean).div_(self._std)
            if self._recipe.erase:
                erase(augmented, self._recipe.erase)
            if self._recipe.channels_last:
                augmented = augmented.contiguous(memory_format=torch.channels_last)
            return augmented


class RandAugment:
    """Changes each image by operations drawn for it alone, of `operations.py`.

    Those of timm's `rand-mM-nN-mstd0.5-inc1`, the authors': N times one of fifteen, which takes
    place in half of the cases, at a magnitude of normal distribution about M. Places that a motion
    brings in from outside the image get the colour `fill` (1, 3, 1, 1).
    """

    def __init__(self, recipe: Recipe, fill: Tensor):
        self._rounds, self._magnitude = recipe.rand_augment, recipe.rand_augment_magnitude
        self._recolourings, self._fill = recolourings(), fill
        self._names = [*self._recolourings, *MOTIONS]

    def __call__(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) from 0 to 1 changed; they may be overwritten."""
        for _ in range(self._rounds):
            drawn = torch.randint(len(self._names), images.shape[:1])
            happens = torch.rand(len(images)) < TAKES_PLACE
            spread = MAGNITUDE_SPREAD * torch.randn(len(images))
            strengths = (self._magnitude + spread).clamp(0, 10) / 10
            strengths *= torch.randint(2, images.shape[:1]) * 2 - 1
            self._change(images, torch.where(happens, drawn, -1), strengths)
        return images

    def _change(self, images: Tensor, drawn: Tensor, strengths: Tensor) -> None:
        """Apply to each image the operation of its number, -1 for none, in place.

        Images of one operation are changed together, those of all motions too.
        """
        matrices = torch.eye(2, 3).repeat(len(images), 1, 1)
        for number, name in enumerate(self._names):
            rows = (drawn == number).nonzero()[:, 0]
            if not len(rows):
                continue
            if name in MOTIONS:
                stretch = images.shape[-2] / images.shape[-1]
                matrices[rows] = MOTIONS[name](strengths[rows], stretch)
            else:
                _change_rows(images, rows, self._recolourings[name], strengths[rows])
        moved = (drawn >= len(self._recolourings)).nonzero()[:, 0]
        if len(moved):
            _change_rows(images, moved, self._move, matrices[moved])

    def _move(self, images: Tensor, matrices: Tensor) -> Tensor:
        size = (images.shape[-2], images.shape[-1])
        return warp(images - self._fill, matrices, size, "zeros") + self._fill


class Jitter:
    """Changes brightness, contrast and saturation by factors from 1 - `amount` to 1 + `amount`.

    Factors are each image's own, the order of the three is drawn for a batch.
    """

    def __init__(self, amount: float):
        self._amount = amount
        known = adjustments()
        self._adjustments = [known[name] for name in ("brightness", "contrast", "saturation")]

    def __call__(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W) from 0 to 1 changed."""
        factors = 1 + self._amount * (2 * torch.rand(3, len(images)) - 1)
        factors = factors.to(images.device)
        for number in torch.randperm(3).tolist():
            images = self._adjustments[number](images, factors[number])
        return images


def erase(images: Tensor, share: float) -> None:
    """Set a rectangle to 0, of normalised images the mean colour, in a `share` of the images.

    `images` are (B, C, H, W). As timm's RandomErasing in its mode `const`.
    Source: Zhong et al. 2017, https://arxiv.org/abs/1708.04896.
    """
    height, width = images.shape[-2:]
    draws = torch.rand(BOX_DRAWS + 1, len(images))
    shape = torch.full((len(images),), width / height)
    left, top, wide, high = place_boxes(draws[1:], ERASED_SHARE, ERASED_ASPECT, shape)
    wide = torch.where(draws[0] < share, wide, 0)
    x, y = ((torch.arange(side) + 0.5) / side for side in (width, height))
    across = (x >= left[:, None]) & (x < (left + wide)[:, None])
    down = (y >= top[:, None]) & (y < (top + high)[:, None])
    across, down = (side.to(images.device, images.dtype) for side in (across, down))
    # A product, as it takes a quarter of the time of filling by a mask.
    images.mul_(1 - down[:, None, :, None] * across[:, None, None])


def _change_rows(images: Tensor, rows: Tensor, operation: Operation, numbers: Tensor) -> None:
    """Replace the images of `rows` by what the operation makes of them and of their numbers."""
    rows, numbers = rows.to(images.device), numbers.to(images.device)
    images.index_copy_(0, rows, operation(images.index_select(0, rows), numbers))
