"""How good one network is on labelled images: accuracy, confusion, and how far to trust it.

Calibration: C. Guo, G. Pleiss, Y. Sun, K. Weinberger, "On calibration of modern neural networks",
ICML 2017. A network is calibrated when, of the images it is 80% sure of, it has 80% right. Images
are sorted by confidence, the probability of their first class, into bins of equal width; the
expected calibration error is the mean distance of a bin's accuracy from its mean confidence,
weighted by its images.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from coat_deploy.measure.accuracy import Share, share
from coat_deploy.runner import Array

CALIBRATION_BINS = 15
"""As many as Guo et al. use in all their tables."""

_EDGES = np.linspace(0, 1, CALIBRATION_BINS + 1)


@dataclass(frozen=True)
class CalibrationBin:
    """The images whose confidence lies in (`low`, `high`]; the means are None where none does."""

    low: float
    high: float
    images: int
    confidence: float | None
    accuracy: float | None

    @property
    def gap(self) -> float:
        """Distance of the accuracy from the confidence, 0 to 1; 0 of no image."""
        if self.confidence is None or self.accuracy is None:
            return 0.0
        return abs(self.accuracy - self.confidence)

    def to_json(self) -> dict[str, float | None]:
        """Return the bin."""
        return {
            "low": self.low,
            "high": self.high,
            "images": self.images,
            "confidence": self.confidence,
            "accuracy": self.accuracy,
        }


@dataclass(frozen=True)
class Confusion:
    """`images` of class `label` that were taken for class `predicted`."""

    label: int
    predicted: int
    images: int


@dataclass(frozen=True, eq=False)
class Quality:
    """Figures of one network over labelled images of K classes.

    `top5` is of the first min(5, K) classes. `per_class` holds the top-1 of each class, None for a
    class without images. `confusion` counts images by (label, first class), (K, K).
    `non_finite` images had NaN or infinity among their logits: they count as wrong, and are in
    neither `confusion` nor what is computed from probabilities. `nll` is the mean negative
    log-likelihood in nats, `mean_confidence` that of the first class's probability; None where
    every image was not finite.
    """

    top1: Share
    top5: Share
    per_class: tuple[Share | None, ...]
    confusion: npt.NDArray[np.int64]
    non_finite: int
    nll: float | None
    mean_confidence: float | None
    bins: tuple[CalibrationBin, ...]

    @property
    def images(self) -> int:
        """How many images all figures are of."""
        return self.top1.total

    @property
    def mean_class_accuracy(self) -> float:
        """Mean top-1 of the classes that have images, 0 to 1: large classes do not outweigh."""
        shares = [found.value for found in self.per_class if found is not None]
        return sum(shares) / len(shares)

    @cached_property
    def calibration_error(self) -> float | None:
        """Expected calibration error, 0 to 1, of `CALIBRATION_BINS` bins of equal width."""
        images = sum(found.images for found in self.bins)
        return sum(found.images * found.gap for found in self.bins) / images if images else None

    def most_confused(self, count: int) -> list[Confusion]:
        """Return the `count` most frequent confusions, most frequent first; fewer if there are."""
        wrong = self.confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:count]
        pairs = [divmod(int(place), len(wrong)) for place in order]
        return [Confusion(*pair, int(wrong[pair])) for pair in pairs if wrong[pair] > 0]

    def to_json(self, labels: Sequence[str]) -> dict[str, Any]:
        """Return the figures under stable keys; `labels` names the K classes."""
        assert len(labels) == len(self.per_class)
        predicted = self.confusion.sum(axis=0).tolist()
        return {
            "images": self.images,
            "top1": self.top1.value,
            "top5": self.top5.value,
            "top1_interval": [self.top1.low, self.top1.high],
            "top5_interval": [self.top5.low, self.top5.high],
            "mean_class_accuracy": self.mean_class_accuracy,
            "nll": self.nll,
            "calibration_error": self.calibration_error,
            "calibration_bins": [found.to_json() for found in self.bins],
            "mean_confidence": self.mean_confidence,
            "non_finite": self.non_finite,
            "labels": list(labels),
            "per_class": {
                label: _class_json(found, count)
                for label, found, count in zip(
                    _told_apart(labels), self.per_class, predicted, strict=True
                )
            },
            "confusion": self.confusion.tolist(),
        }


def _told_apart(labels: Sequence[str]) -> list[str]:
    """Return labels of which none comes twice: a config may give two classes one name."""
    times = Counter(labels)
    return [
        label if times[label] == 1 else f"{label} (class {i})" for i, label in enumerate(labels)
    ]


def _class_json(found: Share | None, predicted: int) -> dict[str, Any]:
    return {
        "images": found.total if found else 0,
        "correct": found.correct if found else 0,
        "predicted": predicted,
        "accuracy": found.value if found else None,
        "interval": [found.low, found.high] if found else None,
    }


class QualityMeter:
    """Accumulates logits and labels batch by batch; holds counts and sums, never the images.

    Give every image once: repeats narrow the intervals.
    """

    def __init__(self, num_classes: int) -> None:
        assert num_classes > 0
        self.images = 0
        self._labels = np.zeros(num_classes, np.int64)
        self._confusion = np.zeros((num_classes, num_classes), np.int64)
        self._in_top5 = 0
        self._nll = 0.0
        # By bin: images, those right, and their confidences.
        self._bins = np.zeros((3, CALIBRATION_BINS))

    def add(self, logits: Array, labels: Sequence[int] | npt.NDArray[np.int64]) -> None:
        """Add a batch: logits (B, K), and B class indices, 0 to K - 1.

        Of equal logits the first class comes first, as in `predict`.
        """
        wanted = np.asarray(labels, np.int64)
        classes = len(self._labels)
        assert logits.shape == (len(wanted), classes)
        assert ((wanted >= 0) & (wanted < classes)).all()
        self.images += len(wanted)
        self._labels += np.bincount(wanted, minlength=classes)
        sound = np.isfinite(logits).all(axis=1)
        self._add_sound(logits[sound].astype(np.float64), wanted[sound])

    def _add_sound(self, logits: npt.NDArray[np.float64], wanted: npt.NDArray[np.int64]) -> None:
        top = np.argsort(-logits, axis=1, kind="stable")[:, :5]
        np.add.at(self._confusion, (wanted, top[:, 0]), 1)
        self._in_top5 += int((top == wanted[:, None]).sum())
        shifted = logits - logits.max(axis=1, keepdims=True)
        total = np.exp(shifted).sum(axis=1)
        self._nll += float((np.log(total) - shifted[np.arange(len(wanted)), wanted]).sum())
        confidence = 1 / total  # of the first class, whose shifted logit is 0
        places = np.searchsorted(_EDGES[1:], confidence)
        for row, values in enumerate((np.ones_like(confidence), top[:, 0] == wanted, confidence)):
            self._bins[row] += np.bincount(places, values, CALIBRATION_BINS)

    def quality(self) -> Quality | None:
        """Return the figures of everything added, None when that is nothing."""
        if self.images == 0:
            return None
        right = np.diagonal(self._confusion).tolist()
        sound = int(self._confusion.sum())
        return Quality(
            top1=share(sum(right), self.images),
            top5=share(self._in_top5, self.images),
            per_class=tuple(
                share(correct, total) if total else None
                for correct, total in zip(right, self._labels.tolist(), strict=True)
            ),
            confusion=self._confusion.copy(),
            non_finite=self.images - sound,
            nll=self._nll / sound if sound else None,
            mean_confidence=float(self._bins[2].sum()) / sound if sound else None,
            bins=tuple(map(_bin, _EDGES[:-1], _EDGES[1:], *self._bins)),
        )


def _bin(low: float, high: float, images: float, right: float, confidence: float) -> CalibrationBin:
    count = int(images)
    means = (float(confidence) / count, float(right) / count) if count else (None, None)
    return CalibrationBin(float(low), float(high), count, *means)
