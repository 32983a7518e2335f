"""From logits to named classes."""

from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from coat_deploy.runner import Array


class ScoredLabel(TypedDict):
    """A class and its probability, the softmax of its logit."""

    label: str
    score: float


def top_labels(logits: Array, labels: Sequence[str], count: int) -> list[ScoredLabel]:
    """Return the `count` likeliest of `labels` for the logits (K,) of one image, best first.

    Equal logits keep the order of the classes.
    """
    assert logits.shape == (len(labels),)
    shifted = logits.astype(np.float64) - logits.max()
    scores = np.exp(shifted) / np.exp(shifted).sum()
    best = np.argsort(-scores, kind="stable")[:count]
    return [{"label": labels[i], "score": float(scores[i])} for i in best]
