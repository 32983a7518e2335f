"""What a training is given, what comes out of it, and how else it may end."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from coat_deploy.data.dataset import Dataset, Stream
from coat_deploy.errors import TrainingError
from coat_deploy.measure.quality import Quality
from coat_deploy.spec import ModelSpec
from coat_deploy.train.recipe import Recipe


@dataclass(frozen=True)
class Plan:
    """What is to be trained, on what, how, and where what it needs to go on is kept.

    `run` holds whatever a resumed training must have in common with the one it resumes.
    """

    spec: ModelSpec
    network: nn.Module
    recipe: Recipe
    train: Dataset | Stream
    validation: Dataset
    folder: Path
    run: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    """What came out: weights by key on the CPU, and how good they are on the validation images.

    `epoch` is the one whose weights these are: the last, or with `patience` the best.
    `images` were there to train on.
    """

    weights: Mapping[str, Tensor]
    quality: Quality
    epoch: int
    images: int
    seconds: float


class Stopped(TrainingError):
    """A training that was asked to stop; everything it needs to go on was saved."""


class Diverged(TrainingError):
    """A training whose loss is no number any more; every process tells so, of the same step."""


class Abandoned(TrainingError):
    """A training that lost another of its processes, which will have told why."""
