"""A training as it is watched: a bar on a terminal, plain lines in a log; both on stderr."""

import contextlib
import logging
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TextIO

from coat_deploy.cli import console
from coat_deploy.train.progress import EpochReport, StepReport, Watcher

if TYPE_CHECKING:
    from rich.progress import Progress

LINE_EVERY_S = 5.0
"""Least time between two lines of a log that do not tell an accuracy."""

_WINDOW = 50
"""Steps over which what a bar shows is averaged."""


def training_progress() -> Watcher:
    """Return who shows a training: a bar where stderr is a terminal, else a line an epoch."""
    if sys.stderr.isatty() and os.environ.get("TERM") != "dumb":
        return TrainingBar()
    return TrainingLines()


class TrainingLines:
    """Tells of epochs, a plain line each: those that were evaluated, and others now and then.

    A `Watcher`. The first epoch and the last always have a line.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._pace = Pace(clock)
        self._last = float("-inf")

    def step(self, report: StepReport) -> None:
        """Note the pace."""
        self._pace.add(report)

    def epoch(self, report: EpochReport) -> None:
        """Print a line, or leave it out."""
        now = self._clock()
        telling = report.top1 is not None or report.epoch == report.epochs
        if telling or now - self._last >= LINE_EVERY_S:
            left = "" if report.epoch == report.epochs else f", {self._pace.left()} left"
            console.note(
                f"{epoch_line(report)}  ({report.images_per_s:.0f} images/s, "
                f"data {report.data_share:.0%}{left})"
            )
            self._last = now

    def close(self) -> None:
        """Do nothing."""


class TrainingBar:
    """Shows a bar over the steps, and a line above it for each epoch. A `Watcher`.

    The bar appears with the first step and goes with `close`; the lines stay.
    """

    def __init__(self) -> None:
        self._pace = Pace()
        self._open = contextlib.ExitStack()
        self._bar: Progress | None = None
        self._task: Any = None

    def step(self, report: StepReport) -> None:
        """Move the bar on."""
        self._pace.add(report)
        if self._bar is None:
            before = sys.stderr
            self._bar = self._open.enter_context(_bar())
            self._open.enter_context(_log_above_the_bar(before))
            self._task = self._bar.add_task("", total=report.steps, told="")
        self._bar.update(
            self._task,
            completed=report.step,
            description=f"epoch {report.epoch}/{report.epochs}",
            told=self._pace.told(),
        )

    def epoch(self, report: EpochReport) -> None:
        """Print a line above the bar."""
        if self._bar is None:
            console.note(epoch_line(report))
        else:
            self._bar.console.print(epoch_line(report), markup=False, highlight=False)

    def close(self) -> None:
        """Take the bar away."""
        self._open.close()
        self._bar = None


class Pace:
    """How fast a training goes, from its steps."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._window: deque[StepReport] = deque(maxlen=_WINDOW)
        self._begun: tuple[float, int] | None = None

    def add(self, report: StepReport) -> None:
        """Take note of a step."""
        if self._begun is None:
            self._begun = self._clock(), report.step
        self._window.append(report)

    def left(self) -> str:
        """Return how long it will still take, as h:mm:ss; a question mark before the first step.

        What comes between steps counts too, evaluations and checkpoints. Steps may be told of
        several at a time: until the clock has caught up, their own durations count.
        """
        if self._begun is None:
            return "?"
        since, first = self._begun
        last = self._window[-1]
        own = self._seconds() / len(self._window)
        passed = (self._clock() - since) / max(last.step - first, 1)
        return str(timedelta(seconds=round(max(own, passed) * (last.steps - last.step))))

    def told(self) -> str:
        """Return loss, images a second, share of time spent on data, and time left."""
        seconds = max(self._seconds(), 1e-9)
        loss = sum(report.loss for report in self._window) / len(self._window)
        images = sum(report.images for report in self._window)
        data = sum(report.data_seconds for report in self._window)
        return (
            f"loss {loss:.3f}, {images / seconds:.0f} images/s, data {data / seconds:.0%}, "
            f"{self.left()} left"
        )

    def _seconds(self) -> float:
        return sum(report.seconds for report in self._window)


def epoch_line(report: EpochReport) -> str:
    """Return an epoch in a line: its loss, and the accuracy if it was measured."""
    width = len(str(report.epochs))
    parts = [f"epoch {report.epoch:{width}}/{report.epochs}", f"loss {report.loss:.4f}"]
    if report.validation_loss is not None:
        parts.append(f"validation {report.validation_loss:.4f}")
    if report.top1 is not None:
        parts.append(f"top-1 {report.top1:.2%}")
    return "  ".join([*parts, str(timedelta(seconds=round(report.seconds)))])


def _bar() -> "Progress":
    from rich import progress
    from rich.console import Console

    return progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(bar_width=None),
        progress.TaskProgressColumn(),
        progress.TextColumn("{task.fields[told]}", markup=False),
        console=Console(stderr=True),
        refresh_per_second=4,
        transient=True,
        expand=True,
    )


@contextlib.contextmanager
def _log_above_the_bar(before: TextIO) -> Iterator[None]:
    """Let what is logged pass through the bar's stand-in for stderr, which lifts it above."""
    handlers = [
        handler
        for handler in logging.root.handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream is before
    ]
    for handler in handlers:
        handler.setStream(sys.stderr)
    try:
        yield
    finally:
        for handler in handlers:
            handler.setStream(before)
