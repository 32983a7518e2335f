"""What a training tells while it runs, and who may listen."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepReport:
    """One step of the optimiser, over all processes.

    `step` counts from 1 to `steps`, `epoch` from 1. `images` were seen in it; `seconds` it took,
    `data_seconds` of them waiting for images and changing them.
    """

    step: int
    steps: int
    epoch: int
    epochs: int
    loss: float
    learning_rate: float
    images: int
    seconds: float
    data_seconds: float


@dataclass(frozen=True)
class EpochReport:
    """An epoch, and what was measured after it, if anything.

    `loss` is the mean over its steps, smoothed and mixed labels included. `images_per_s` is over
    all processes and the epoch's steps alone. `data_share` is the share of that time spent on
    data, `checkpoint_share` the share of all time so far spent on checkpoints (0 to 1).
    `seconds` have passed since the training began, those of an interrupted run included.
    `top1`, `top5` (0 to 1) and `validation_loss` are of the averaged weights, where there is an
    average; None in epochs without an evaluation.
    """

    epoch: int
    epochs: int
    step: int
    loss: float
    learning_rate: float
    images_per_s: float
    data_share: float
    checkpoint_share: float
    seconds: float
    top1: float | None = None
    top5: float | None = None
    validation_loss: float | None = None


class Watcher(Protocol):
    """Who is told; only the first of several processes has any."""

    def step(self, report: StepReport) -> None:
        """Take note of a step."""
        ...

    def epoch(self, report: EpochReport) -> None:
        """Take note of an epoch."""
        ...

    def close(self) -> None:
        """Finish what is being written."""
        ...
