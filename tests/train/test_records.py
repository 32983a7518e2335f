"""What a training writes on the way, on a disk that fails it."""

import logging

import pytest

from coat_deploy.errors import RepositoryError
from coat_deploy.train.history import History, read_history
from coat_deploy.train.progress import EpochReport
from coat_deploy.train.records import Chronicle, Dispensable


def report(epoch: int) -> EpochReport:
    return EpochReport(epoch, 9, 6 * epoch, 1 / epoch, 0.1, 50.0, 0.1, 0.0, 2.0 * epoch)


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Epochs whose lines meet a full disk, half way."""
    epochs: set[int] = set()
    usual = History.epoch

    def epoch(history: History, report: EpochReport) -> None:
        if report.epoch in epochs:
            history._file.write(b"7,9,")
            raise RepositoryError("history.csv: cannot be written (No space left on device).")
        usual(history, report)

    monkeypatch.setattr(History, "epoch", epoch)
    return epochs


def test_lines_that_met_a_full_disk_are_written_later(failing, tmp_path, caplog):
    path = tmp_path / "history.csv"
    chronicle = Chronicle(path)
    with caplog.at_level(logging.WARNING):
        for epoch in (1, 2, 3, 4):
            failing.symmetric_difference_update({2} if epoch in (2, 4) else ())
            chronicle.epoch(report(epoch))
    chronicle.close()
    assert read_history(path) == [report(epoch) for epoch in (1, 2, 3, 4)]
    assert len(caplog.messages) == 2  # in epoch 2 and, since it was tried again, in epoch 3
    assert all("Training goes on; the history is written later." in m for m in caplog.messages)


def test_a_resumed_training_knows_the_epochs_before(tmp_path):
    path = tmp_path / "history.csv"
    first = Chronicle(path)
    for epoch in (1, 2, 3):
        first.epoch(report(epoch))
    first.close()
    second = Chronicle(path, after_epoch=2)
    second.epoch(report(3))
    second.close()
    assert second.reports == read_history(path) == [report(epoch) for epoch in (1, 2, 3)]


def test_a_history_that_cannot_be_begun_is_an_error(tmp_path):
    (tmp_path / "history.csv").mkdir()
    with pytest.raises(RepositoryError):
        Chronicle(tmp_path / "history.csv")


class Failing:
    """A `Watcher` that cannot write."""

    def __init__(self) -> None:
        self.calls = 0

    def step(self, report: object) -> None:
        self.calls += 1
        raise RepositoryError("events: cannot be written (No space left on device).")

    epoch = step

    def close(self) -> None:
        self.calls += 1


def test_a_watcher_that_fails_is_told_of_once_and_left_alone(caplog):
    failing = Failing()
    watcher = Dispensable(failing)
    with caplog.at_level(logging.WARNING):
        watcher.epoch(report(1))
        watcher.epoch(report(2))
        watcher.close()
    assert failing.calls == 1
    assert caplog.messages == [
        "events: cannot be written (No space left on device). Training goes on without."
    ]
