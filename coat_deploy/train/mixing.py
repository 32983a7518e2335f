"""Mixup, CutMix and label smoothing of a whole batch, and the loss for what comes of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from coat_deploy.train.recipe import Recipe


class Mixing:
    """Mixes the images of a batch in pairs, and their labels with them.

    One draw serves a batch, as in the authors' training (timm's batch mode): which of the two
    ways, in half of the batches each where both are on, and how much. So pasting is one copy of
    one box. The n-th image is mixed with the n-th from the end.

    Random numbers come from torch's default generator on the CPU, nothing is kept between calls.

    Sources: Zhang et al. 2018, https://arxiv.org/abs/1710.09412; Yun et al. 2019,
    https://arxiv.org/abs/1905.04899.
    """

    def __init__(self, recipe: Recipe, classes: int):
        self._alphas = (recipe.mixup, recipe.cutmix)
        self._share = recipe.mix_share if max(self._alphas) > 0 else 0.0
        self._until = recipe.mix_until
        self._smoothing = recipe.label_smoothing
        self._classes = classes

    def __call__(self, images: Tensor, labels: Tensor, done: float = 0.0) -> tuple[Tensor, Tensor]:
        """Return the batch mixed, and what it shows: (B, K) float32, each row's sum is 1.

        `images` (B, C, H, W) may be overwritten. `labels` (B,) are classes from 0. `done`: the
        share of the training that lies behind.
        """
        targets = smooth_labels(labels, self._classes, self._smoothing)
        if done >= self._until or torch.rand(()).item() >= self._share:
            return images, targets
        mixup, cutmix = self._alphas
        by_cutmix = torch.rand(()).item() < (0.5 if mixup and cutmix else float(cutmix > 0))
        alpha = torch.tensor(cutmix if by_cutmix else mixup)
        kept = torch.distributions.Beta(alpha, alpha).sample().item()
        if by_cutmix:
            kept = _paste(images, kept)
        else:
            images = images.lerp(images.flip(0), 1 - kept)
        return images, targets.lerp(targets.flip(0), 1 - kept)


def smooth_labels(labels: Tensor, classes: int, smoothing: float) -> Tensor:
    """Return targets (B, K) float32: `smoothing` spread over all classes, the rest on the label."""
    targets = torch.full((len(labels), classes), smoothing / classes, device=labels.device)
    return targets.scatter_(1, labels[:, None], 1 - smoothing + smoothing / classes)


def soft_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy of logits (B, K) and targets (B, K), in float32.

    Whatever the precision of the logits: in halves, the logarithms of a thousand small
    probabilities would be rounded.
    """
    return F.cross_entropy(logits.float(), targets)


def _paste(images: Tensor, kept: float) -> float:
    """Paste a box of each image's partner into it, in place; return the share that it keeps.

    The box has the images' aspect ratio and its centre anywhere, so that some of it may fall
    outside: the share is that of the pixels.
    """
    sides, places = images.shape[-2:], torch.rand(2).tolist()
    (top, bottom), (left, right) = (
        _span(side, int(side * (1 - kept) ** 0.5), int(side * place))
        for side, place in zip(sides, places, strict=True)
    )
    images[..., top:bottom, left:right] = images[..., top:bottom, left:right].flip(0)
    return 1 - (bottom - top) * (right - left) / (sides[0] * sides[1])


def _span(side: int, length: int, centre: int) -> tuple[int, int]:
    """Return where a stretch of pixels begins and ends within a side."""
    return max(0, centre - length // 2), min(side, centre + (length + 1) // 2)
