"""Top-1 and top-5 of two networks on the same labelled images, and whether they differ.

Intervals: E. B. Wilson, "Probable inference, the law of succession, and statistical inference",
JASA 22 (1927), the score interval: it stays inside [0, 1] and is honest near its ends.
Difference: Q. McNemar, Psychometrika 12 (1947), in its exact form. Only images that one network
has right and the other wrong tell them apart; were they equally good, each such image would be a
toss of a fair coin.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import UsageError
from coat_deploy.runner import Array

Z_95 = 1.959963984540054
"""The normal distribution's 97.5% quantile."""


@dataclass(frozen=True)
class Share:
    """`correct` of `total` images, with the 95% Wilson interval `low`..`high` (0 to 1)."""

    correct: int
    total: int
    low: float
    high: float

    @property
    def value(self) -> float:
        """The share itself, 0 to 1."""
        return self.correct / self.total

    def to_json(self) -> dict[str, float]:
        """Return the share with its interval."""
        return {
            "value": self.value, "low": self.low, "high": self.high, "correct": self.correct,
        }  # fmt: skip


@dataclass(frozen=True)
class Paired:
    """A reference and a candidate on the same images.

    `reference_only`, `candidate_only`: images that only that one has right.
    `p_value`: of McNemar's exact two-sided test, the chance that two equally good networks split
    these images so unevenly or more.
    """

    reference: Share
    candidate: Share
    reference_only: int
    candidate_only: int
    p_value: float

    @property
    def is_noise(self) -> bool:
        """Whether the difference may be chance (p of 0.05 or more)."""
        return self.p_value >= 0.05

    def to_json(self) -> dict[str, Any]:
        """Return both shares, the discordant images and the test."""
        return {
            "reference": self.reference.to_json(),
            "candidate": self.candidate.to_json(),
            "difference": self.candidate.value - self.reference.value,
            "reference_only": self.reference_only,
            "candidate_only": self.candidate_only,
            "p_value": self.p_value,
            "difference_is_noise": self.is_noise,
        }


@dataclass(frozen=True)
class Accuracy:
    """Accuracy of a reference and a candidate over `images` labelled images."""

    images: int
    top1: Paired
    top5: Paired

    def to_json(self) -> dict[str, Any]:
        """Return the figures under stable keys."""
        return {"images": self.images, "top1": self.top1.to_json(), "top5": self.top5.to_json()}


class AccuracyMeter:
    """Accumulates hits batch by batch. Give every image once: repeats narrow the intervals."""

    def __init__(self) -> None:
        self.images = 0
        # For top-1 and top-5, images by (reference right, candidate right).
        self._counts = np.zeros((2, 2, 2), dtype=np.int64)

    def add(self, reference: Array, candidate: Array, labels: Sequence[int]) -> None:
        """Add a batch: logits (B, K) of both, and B class indices.

        Logits that are not finite count as wrong.
        Raises: UsageError for a label that is not among the K classes.
        """
        assert reference.shape == candidate.shape and len(labels) == len(reference)
        classes = reference.shape[1]
        for label in labels:
            if not 0 <= label < classes:
                raise UsageError(
                    f"label {label}: not a class of the network (expected 0 to {classes - 1}). "
                    "Give a folder whose classes are the model's."
                )
        wanted = np.asarray(labels)[:, None]
        hits = [_hits(logits, wanted) for logits in (reference, candidate)]
        for k in range(2):
            np.add.at(self._counts[k], (hits[0][k], hits[1][k]), 1)
        self.images += len(labels)

    def accuracy(self) -> Accuracy | None:
        """Return the figures of everything added, None when that is nothing."""
        if self.images == 0:
            return None
        return Accuracy(self.images, _paired(self._counts[0]), _paired(self._counts[1]))


def _hits(logits: Array, wanted: npt.NDArray[np.int_]) -> tuple[npt.NDArray[np.int_], ...]:
    """Return, an image, 1 where `wanted` (B, 1) is first, and where it is among the first five."""
    first = min(5, logits.shape[1])
    top = np.argsort(-logits, axis=1, kind="stable")[:, :first]
    right = (top == wanted) & np.isfinite(logits).all(axis=1, keepdims=True)
    return right[:, 0].astype(np.int_), right.any(axis=1).astype(np.int_)


def _paired(counts: npt.NDArray[np.int64]) -> Paired:
    neither, candidate_only, reference_only, both = (int(n) for n in counts.ravel())
    total = neither + candidate_only + reference_only + both
    return Paired(
        reference=share(both + reference_only, total),
        candidate=share(both + candidate_only, total),
        reference_only=reference_only,
        candidate_only=candidate_only,
        p_value=mcnemar(reference_only, candidate_only),
    )


def share(correct: int, total: int) -> Share:
    """Return a share with its 95% Wilson score interval."""
    assert 0 <= correct <= total and total > 0
    p, z2 = correct / total, Z_95**2
    centre = (p + z2 / (2 * total)) / (1 + z2 / total)
    half = Z_95 / (1 + z2 / total) * math.sqrt(p * (1 - p) / total + z2 / (4 * total**2))
    # At 0 and at 1 the formula meets the end exactly; rounding must not step over it.
    low = 0.0 if correct == 0 else max(0.0, centre - half)
    high = 1.0 if correct == total else min(1.0, centre + half)
    return Share(correct, total, low, high)


def mcnemar(first_only: int, second_only: int) -> float:
    """Return the p-value of McNemar's exact two-sided test on the two discordant counts.

    p = 2 P(X <= min), X ~ Binomial(n, 1/2), at most 1. Summed in whole numbers, so exact for any
    n; tens of thousands of discordant images take a fraction of a second.
    """
    assert first_only >= 0 and second_only >= 0
    n, fewer = first_only + second_only, min(first_only, second_only)
    if 2 * fewer >= n - 1:  # half of the distribution or more: nothing to sum
        return 1.0
    ways = total = 1  # n over 0
    for k in range(fewer):
        ways = ways * (n - k) // (k + 1)
        total += ways
    return float((2 * total) / (1 << n))
