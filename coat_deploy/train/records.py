"""What a training writes while it runs, without which it can go on.

A disk that is full for a while costs lines of a log, not hours of work: it is told, and what can
be made up for is written later.
"""

import logging
from collections.abc import Callable
from pathlib import Path

from coat_deploy.errors import RepositoryError
from coat_deploy.train.history import History, read_history
from coat_deploy.train.progress import EpochReport, StepReport, Watcher

_log = logging.getLogger(__name__)


class Chronicle:
    """The history, in memory and as a CSV; what could not be written is tried again. A `Watcher`.

    `reports` are of all epochs, those before `after_epoch` too, as far as the file knew them.
    Raises: RepositoryError when the file cannot be written, or not be read where it must be.
    """

    def __init__(self, path: Path, after_epoch: int = 0) -> None:
        self._path = path
        self._file: History | None = History(path, after_epoch)
        self.reports: list[EpochReport] = read_history(path)

    def step(self, report: StepReport) -> None:
        """Do nothing: only epochs have a line."""

    def epoch(self, report: EpochReport) -> None:
        """Append a line, or write all of them if the last ones could not be written."""
        self.reports.append(report)
        try:
            if self._file is None:
                self._file = History(self._path)
                pending = self.reports
            else:
                pending = [report]
            for line in pending:
                self._file.epoch(line)
        except RepositoryError as error:
            _log.warning("%s Training goes on; the history is written later.", error)
            self.close()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Dispensable:
    """Passes on what it is told, until that cannot be written. A `Watcher`."""

    def __init__(self, watcher: Watcher) -> None:
        self._watcher: Watcher | None = watcher

    def step(self, report: StepReport) -> None:
        """Pass on a step."""
        self._try(lambda watcher: watcher.step(report))

    def epoch(self, report: EpochReport) -> None:
        """Pass on an epoch."""
        self._try(lambda watcher: watcher.epoch(report))

    def close(self) -> None:
        """Finish what is being written."""
        self._try(lambda watcher: watcher.close())

    def _try(self, tell: Callable[[Watcher], None]) -> None:
        if self._watcher is None:
            return
        try:
            tell(self._watcher)
        except RepositoryError as error:
            self._watcher = None
            _log.warning("%s Training goes on without.", error)
