"""Encoded images to labels, in whatever process it is sent to."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.errors import ImageError, RunnerError, StaleArtifact
from coat_deploy.labels import ScoredLabel
from coat_deploy.open import Source, open_source
from coat_deploy.processing import Processing
from coat_deploy.runner import LOGITS, Array, Closing, LoadOptions, Runner


@dataclass(frozen=True)
class NamedImage:
    """An image file, or the content of one, and what errors call it."""

    name: str
    content: Path | bytes


Answer = list[ScoredLabel] | ImageError | RunnerError
"""The labels of an image, best first, or why there are none."""


class Classifier(Closing):
    """A callable from images to labels that can be pickled: every process opens the artifact.

    `load.batch` images are computed a step. Closing it frees the runtime, if it was opened.
    """

    def __init__(self, source: Source, load: LoadOptions, top: int = 5) -> None:
        # Where it is called, another folder may be the current one.
        model = replace(source.model, folder=Path(os.path.abspath(source.model.folder)))
        self.source, self.load, self.top = replace(source, model=model), load, top
        self.processing = Processing.of(source)
        self.sha256 = source.sha256
        """Digest of the artifact, of the weights for eager: no process answers by another."""
        self._runner: Runner | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runner": None}

    def open(self) -> Runner:
        """Return the runner; the first call opens and proves the artifact.

        Raises: StaleArtifact when it is no longer the one this was made for; as `open_source`.
        """
        if self._runner is None:
            if self.source.sha256 != self.sha256:
                raise StaleArtifact(
                    f"{self.source.path}: changed under way (expected {self.sha256[:12]}). "
                    "Restore it, or begin anew with the new one."
                )
            self._runner = open_source(self.source, self.load)
        return self._runner

    def close(self) -> None:
        """Free the runtime; a later call opens it again."""
        if self._runner is not None:
            self._runner.__exit__(None, None, None)
            self._runner = None

    def __call__(self, images: Sequence[NamedImage]) -> list[Answer]:
        """Return an answer an image, in order; one that cannot be read holds nobody up.

        Raises: RunnerError when the runtime fails; as `open`.
        """
        answers: list[Answer] = []
        for start in range(0, len(images), self.load.batch):
            answers += self._step(images[start : start + self.load.batch])
        return answers

    def _step(self, images: Sequence[NamedImage]) -> list[Answer]:
        made = [self._preprocess(image) for image in images]
        pixels = [one for one in made if not isinstance(one, ImageError)]
        logits = iter(self.open().run(np.stack(pixels))[LOGITS] if pixels else ())
        return [
            one if isinstance(one, ImageError) else self._postprocess(next(logits)) for one in made
        ]

    def _preprocess(self, image: NamedImage) -> Array | ImageError:
        try:
            return self.processing.preprocess(image.content, image.name)
        except ImageError as error:
            return error

    def _postprocess(self, logits: Array) -> Answer:
        try:
            return self.processing.postprocess(logits, self.top)
        except RunnerError as error:
            return error
