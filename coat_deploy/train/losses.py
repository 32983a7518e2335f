"""The losses of steps, read from the device now and then: each reading waits for it."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from coat_deploy.train.plan import Diverged
from coat_deploy.train.progress import StepReport

LAST_BATCH = "last_batch.txt"
"""Lists the images of a step whose loss was no number."""
NAMED_IMAGES = 3


class Losses:
    """The losses of steps that were not read yet; its length is their number.

    folder: where the images of a step whose loss is no number are listed.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._unread: list[tuple[Tensor, StepReport, Sequence[str]]] = []

    def __len__(self) -> int:
        return len(self._unread)

    def add(self, loss: Tensor, report: StepReport, names: Sequence[str]) -> None:
        """Keep the loss of a step as it is on the device, and the names of its images."""
        self._unread.append((loss, report, names))

    def read(self, accelerator: Accelerator) -> Iterator[StepReport]:
        """Yield the reports of the steps since the last reading, with losses over all processes.

        Raises: Diverged for one that is no number, naming images of its step.
        """
        if not self._unread:
            return
        unread, self._unread = self._unread, []
        losses = torch.stack([loss for loss, _, _ in unread])
        values = accelerator.reduce(losses, "mean").tolist()
        for value, (_, report, names) in zip(values, unread, strict=True):
            if not math.isfinite(value):
                self._refuse(accelerator, value, report, names)
            yield replace(report, loss=value)

    def _refuse(
        self, accelerator: Accelerator, loss: float, report: StepReport, names: Sequence[str]
    ) -> NoReturn:
        every = names if accelerator.num_processes == 1 else gather_object(list(names))
        path = self._folder / LAST_BATCH
        if accelerator.is_main_process:
            with contextlib.suppress(OSError):
                path.write_text("".join(f"{name}\n" for name in every), encoding="utf-8")
        raise Diverged(
            f"training: the loss is {loss} at step {report.step} (epoch {report.epoch}, learning "
            f"rate {report.learning_rate:.3g}). Its images: {', '.join(every[:NAMED_IMAGES])}, ... "
            f"(all {len(every)} in {path}). Look at them, lower learning_rate or set clip_norm; "
            "what was saved before is as it was."
        )
