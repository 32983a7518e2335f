"""The history of a training as a CSV: one line an epoch, there to be read while it runs.

The columns are the fields of `EpochReport`, in its order; what was not measured is empty. Numbers
are written so that they read back to the bit.
"""

import csv
import dataclasses
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from coat_deploy.errors import RepositoryError
from coat_deploy.train.progress import EpochReport, StepReport
from coat_deploy.transaction import write_file, writing

_log = logging.getLogger(__name__)

MAX_HISTORY_BYTES = 64 << 20
"""Largest history that is read: the longest training we allow writes half of it."""

_FIELDS = dataclasses.fields(EpochReport)
_COLUMNS = tuple(field.name for field in _FIELDS)


class History:
    """Writes a CSV, each line whole and at once. A `Watcher`.

    With `after_epoch` 0 the file begins anew. A training that is resumed gives the epochs behind
    it: their lines are kept, later ones dropped, since they will be written again.
    Raises: RepositoryError when the file cannot be written, or not be read where it must be.
    """

    def __init__(self, path: Path, after_epoch: int = 0) -> None:
        self._path = path
        kept = _kept(path, after_epoch)
        aside = path.with_name(f".{path.name}.part")
        try:
            write_file(aside, _lines([_COLUMNS, *map(_cells, kept)]))
            with writing(path):
                os.replace(aside, path)
        except BaseException:
            aside.unlink(missing_ok=True)
            raise
        with writing(path):
            # No buffer: what a full disk refuses must not be tried again on closing.
            self._file = path.open("ab", buffering=0)

    def step(self, report: StepReport) -> None:
        """Do nothing: only epochs have a line."""

    def epoch(self, report: EpochReport) -> None:
        """Append a line. Raises RepositoryError."""
        line = memoryview(_lines([_cells(report)]))
        with writing(self._path):
            while line:
                line = line[self._file.write(line) :]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_history(path: Path) -> list[EpochReport]:
    """Return the reports in a CSV, epochs rising; a last line that was not finished is left out.

    Raises: RepositoryError for a file that cannot be read or is no history.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_HISTORY_BYTES + 1)
        if len(data) > MAX_HISTORY_BYTES:
            raise ValueError(f"larger than {MAX_HISTORY_BYTES} bytes")
        whole = data[: data.rfind(b"\n") + 1].decode()
        return _reports(list(csv.reader(io.StringIO(whole, newline=""), strict=True)))
    except OSError as error:
        reason = error.strerror or error
        raise RepositoryError(f"{path}: cannot be read ({reason}). Check the path.") from error
    except (ValueError, csv.Error) as error:
        raise RepositoryError(
            f"{path}: not a history of a training ({error}). Restore the file, or remove it to "
            "begin a new one."
        ) from error


def _kept(path: Path, after_epoch: int) -> list[EpochReport]:
    """Return what the file says of the epochs up to `after_epoch`."""
    if after_epoch == 0:
        return []
    reports = read_history(path) if path.exists() else []
    kept = [report for report in reports if report.epoch <= after_epoch]
    if len(kept) < after_epoch:
        _log.warning(
            "%s: holds %d of the %d epochs before this one; the others are lost to it",
            path, len(kept), after_epoch,
        )  # fmt: skip
    return kept


def _cells(report: EpochReport) -> tuple[object, ...]:
    return dataclasses.astuple(report)


def _lines(rows: Sequence[Sequence[object]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


def _reports(rows: Sequence[Sequence[str]]) -> list[EpochReport]:
    """Read rows of cells, the header first. Raises ValueError."""
    if not rows or tuple(rows[0]) != _COLUMNS:
        got = ",".join(rows[0]) if rows else ""
        raise ValueError(f"its first line is {got!r:.60}, expected {','.join(_COLUMNS)!r}")
    reports: list[EpochReport] = []
    for number, cells in enumerate(rows[1:], start=2):
        try:
            report = EpochReport(
                *(_value(text, field) for text, field in zip(cells, _FIELDS, strict=True))
            )
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if reports and report.epoch <= reports[-1].epoch:
            raise ValueError(
                f"line {number}: epoch {report.epoch} comes after epoch {reports[-1].epoch}"
            )
        reports.append(report)
    return reports


def _value(text: str, field: dataclasses.Field[Any]) -> Any:
    """Read a cell as its field's type. Raises ValueError."""
    if field.type is int:
        return int(text)
    may_lack = field.default is None
    return None if may_lack and text == "" else float(text)
