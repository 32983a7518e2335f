"""Scalars for TensorBoard, in messages and with checksums of tensorboardX.

Its `SummaryWriter` is left aside: that hands events to a thread, which a full disk ends, and the
training would then wait for ever for the thread to take the next one.
"""

import struct
import time
from pathlib import Path
from typing import Any

from coat_deploy.errors import BackendMissing
from coat_deploy.train.progress import EpochReport, StepReport
from coat_deploy.transaction import writing

MAX_POINTS = 10_000
"""Most points of a curve over steps: TensorBoard draws a thousand of them."""

_VERSION = "brain.Event:2"


class TensorBoard:
    """Writes an event file into `folder`. A `Watcher`.

    Every curve is over steps of the optimiser; `train/epoch` turns them into epochs.
    `first_step` is the step a resumed training begins with: TensorBoard then drops what earlier
    files in the folder say of it and later ones. 1 begins anew, and drops everything.
    Raises: BackendMissing without tensorboardX, RepositoryError when it cannot be written.
    """

    def __init__(self, folder: Path, first_step: int = 1) -> None:
        try:
            from tensorboardX.proto.event_pb2 import SessionLog
        except ImportError:
            raise BackendMissing(
                "TensorBoard: package tensorboardX is not installed. "
                'Run: pip install "coat-deploy[train]".'
            ) from None
        now = time.time_ns()
        # Files are read in the order of their names.
        self._path = folder / f"events.out.tfevents.{now // 10**9:010}.{now}"
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            # No buffer: what a full disk refuses must not be tried again on closing.
            self._file = self._path.open("xb", buffering=0)
        self._write(file_version=_VERSION)
        self._write(step=first_step, session_log=SessionLog(status=SessionLog.START))

    def step(self, report: StepReport) -> None:
        """Write a point of the step, or leave it out where there are very many."""
        if report.step % max(1, report.steps // MAX_POINTS) and report.step != report.steps:
            return
        self._scalars(
            report.step,
            {
                "train/loss": report.loss,
                "train/learning_rate": report.learning_rate,
                "train/images_per_s": report.images / max(report.seconds, 1e-9),
                "train/data_share": report.data_seconds / max(report.seconds, 1e-9),
            },
        )

    def epoch(self, report: EpochReport) -> None:
        """Write the means of an epoch and what was measured after it."""
        self._scalars(
            report.step,
            {
                "train/epoch": report.epoch,
                "epoch/loss": report.loss,
                "epoch/images_per_s": report.images_per_s,
                "epoch/data_share": report.data_share,
                "epoch/checkpoint_share": report.checkpoint_share,
                "validation/top1": report.top1,
                "validation/top5": report.top5,
                "validation/loss": report.validation_loss,
            },
        )

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _scalars(self, step: int, values: dict[str, float | None]) -> None:
        from tensorboardX.proto.summary_pb2 import Summary

        points = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in values.items()
            if value is not None
        ]
        self._write(step=step, summary=Summary(value=points))

    def _write(self, **fields: Any) -> None:
        """Append an event. Raises RepositoryError."""
        from tensorboardX.proto.event_pb2 import Event

        record = memoryview(_record(Event(wall_time=time.time(), **fields).SerializeToString()))
        with writing(self._path):
            while record:
                record = record[self._file.write(record) :]


def _record(data: bytes) -> bytes:
    """Return a record of TensorFlow's format: length, its checksum, the data, their checksum."""
    from tensorboardX.record_writer import masked_crc32c

    length = struct.pack("<Q", len(data))
    sums = (struct.pack("<I", masked_crc32c(part)) for part in (length, data))
    return length + next(sums) + data + next(sums)
