"""From logits to named classes."""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import RunnerError
from coat_deploy.runner import Array

FEW = 16
"""Classes up to which one after another is found sooner than all are sorted."""


class ScoredLabel(TypedDict):
    """A class and its probability, the softmax of its logit."""

    label: str
    score: float


def top_labels(logits: Array, labels: Sequence[str], count: int) -> list[ScoredLabel]:
    """Return the `count` likeliest of `labels` for the logits (K,) of one image, best first.

    Equal logits keep the order of the classes.
    Raises: RunnerError for logits with NaN or infinity, which rank nothing.
    """
    assert logits.shape == (len(labels),)
    wide = logits.astype(np.float64)
    highest, lowest = wide.item(wide.argmax()), wide.item(wide.argmin())  # either finds a NaN
    if not (math.isfinite(highest) and math.isfinite(lowest)):
        raise RunnerError(
            "logits: hold NaN or infinity, so there is no first class. "
            "Try a wider precision, or validate the artifact."
        )
    weights = np.exp(wide - highest)
    total = float(weights.sum())
    best = _taken(wide, count)
    return [{"label": labels[i], "score": weights.item(i) / total} for i in best]


def top_classes(logits: npt.NDArray[np.floating], count: int) -> list[int]:
    """Return the `count` classes with the highest of finite logits (K,), best first.

    Equal logits keep the order of the classes.
    """
    return _taken(logits.copy(), count)


def _taken(left: npt.NDArray[np.floating], count: int) -> list[int]:
    """Return the highest, as `top_classes`; `left` is not what it was afterwards."""
    count = min(count, len(left))
    if count > FEW:
        return [int(i) for i in (-left).argsort(kind="stable")[:count]]
    best: list[int] = []
    for _ in range(count):
        best.append(int(left.argmax()))
        left[best[-1]] = -np.inf
    return best
