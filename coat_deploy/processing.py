"""What stands before and behind a network: an image to its input, its logits to labels.

The server, `predict` and whatever labels folders answer alike because they all pass here.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Self

from coat_deploy.images import DEFAULT_LIMITS, ImageLimits, load
from coat_deploy.labels import ScoredLabel, top_labels
from coat_deploy.open import Source
from coat_deploy.repository import read_labels
from coat_deploy.runner import Array
from coat_deploy.spec import Preprocess


@dataclass(frozen=True)
class Processing:
    """The preprocessing and the labels of what a source holds."""

    how: Preprocess
    labels: tuple[str, ...]

    @classmethod
    def of(cls, source: Source) -> Self:
        """Return those of a source, at the image size it takes. Raises: SpecError."""
        spec = source.model.spec
        return cls(spec.preprocess.at(source.size), read_labels(spec))

    def preprocess(
        self,
        image: Path | bytes,
        name: str | None = None,
        limits: ImageLimits = DEFAULT_LIMITS,
    ) -> Array:
        """Return an image file, or its content, as pixels (3, H, W). Raises: ImageError."""
        return load(image, self.how, limits, name)

    def postprocess(self, logits: Array, top: int) -> list[ScoredLabel]:
        """Return the `top` likeliest labels for the logits (K,) of one image, best first.

        Raises: RunnerError for logits with NaN or infinity.
        """
        return top_labels(logits, self.labels, top)
