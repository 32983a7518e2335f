"""How good a model is on labelled images: any runner over any data set, prepared as in serving."""

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from coat_deploy.data.classes import relabel
from coat_deploy.data.dataset import Dataset
from coat_deploy.errors import ImageError
from coat_deploy.images import preprocess
from coat_deploy.measure.quality import Quality, QualityMeter
from coat_deploy.runner import LOGITS, Runner
from coat_deploy.spec import Preprocess

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found.

    `labels` are the model's, in the order of its classes; `skipped` maps the images that could
    not be read to the reason. `seconds` is wall time, of decoding and running together.
    """

    quality: Quality
    labels: tuple[str, ...]
    skipped: Mapping[str, str]
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Images decoded and run a second."""
        return self.quality.images / self.seconds

    def to_json(self) -> dict[str, Any]:
        """Return the figures of quality at the top, and the rest beside them."""
        return {
            **self.quality.to_json(self.labels),
            "skipped": dict(self.skipped),
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
        }


def evaluate(
    runner: Runner,
    data: Dataset,
    labels: Sequence[str],
    how: Preprocess,
    *,
    batch: int = 16,
    limit: int | None = None,
    subject: str = "data",
    progress: Callable[[int], None] = lambda images: None,
    tell: Callable[[str], None] = _log.warning,
) -> Evaluation:
    """Run the images of `data` through `runner` and hold its first classes against their labels.

    `labels` name the runner's classes; those of the images are found among them by name. With
    `limit`, so many images spread evenly over the data. An image that cannot be read is left out
    and handed to `tell` as a sentence; `progress` is called with the number of images done since.
    `subject` stands for the data in errors.
    Raises: UsageError for an image of a class that the model lacks, ImageError when no image can
    be read, RunnerError when the runner fails.
    """
    assert batch > 0 and (limit is None or limit > 0)
    data = relabel(data, tuple(labels), subject)
    wanted = data.labels
    meter = QualityMeter(len(labels))
    skipped: dict[str, str] = {}
    chosen = _spread(len(data), limit)
    start = time.perf_counter()
    for part in _batches(chosen, batch):
        pixels, read = [], []
        for index in part:
            try:
                pixels.append(preprocess(data.image(index), how, data.name(index)))
                read.append(index)
            except ImageError as error:
                skipped[data.name(index)] = str(error)
                tell(f"skipped: {error}")
        if pixels:
            meter.add(runner.run(np.stack(pixels))[LOGITS], wanted[read])
        progress(len(part))
    quality = meter.quality()
    if quality is None:
        raise ImageError(
            f"none of the {len(chosen)} images can be read. Give others, or mend them."
        )
    return Evaluation(quality, tuple(labels), skipped, time.perf_counter() - start)


def _spread(count: int, limit: int | None) -> list[int]:
    """Return the indices of all of `count` images, or of `limit` of them spread evenly."""
    if limit is None or limit >= count:
        return list(range(count))
    return [i * count // limit for i in range(limit)]


def _batches(indices: Sequence[int], batch: int) -> Iterator[Sequence[int]]:
    for start in range(0, len(indices), batch):
        yield indices[start : start + batch]
