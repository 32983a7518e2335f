"""From logits to named classes."""

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from coat_deploy.errors import RunnerError
from coat_deploy.runner import Array


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
    highest = wide.max()
    if not (math.isfinite(highest) and math.isfinite(wide.min())):  # NaN is both
        raise RunnerError(
            "logits: hold NaN or infinity, so there is no first class. "
            "Try a wider precision, or validate the artifact."
        )
    weights = np.exp(wide - highest)
    scores = weights / weights.sum()
    best = (-scores).argsort(kind="stable")[:count]
    return [{"label": labels[i], "score": float(scores[i])} for i in best]
