import logging
import resource
from dataclasses import replace
from pathlib import Path

import pytest

from coat_deploy.errors import RepositoryError
from coat_deploy.train.history import History, read_history
from coat_deploy.train.progress import EpochReport


def report(epoch: int, **changes: float) -> EpochReport:
    """A report whose figures have no short decimal form."""
    plain = EpochReport(
        epoch=epoch,
        epochs=6,
        step=epoch * 40,
        loss=2 / (epoch + 0.1),
        learning_rate=1e-5 / 3,
        images_per_s=812.3456789012345,
        data_share=0.06,
        checkpoint_share=1 / 7,
        seconds=epoch * 1.1,
    )
    return replace(plain, **changes)


REPORTS = [report(1), report(2, top1=1 / 3, top5=2 / 3, validation_loss=0.1), *map(report, (3, 4))]


def write(path: Path, reports: list[EpochReport], after_epoch: int = 0) -> None:
    history = History(path, after_epoch)
    for each in reports:
        history.epoch(each)
    history.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "history.csv"
    write(file, REPORTS)
    return file


def test_what_is_read_is_what_was_written_to_the_bit(path):
    assert read_history(path) == REPORTS


def test_the_columns_are_the_fields_of_a_report(path):
    header, first, *_ = path.read_text().splitlines()
    assert header == (
        "epoch,epochs,step,loss,learning_rate,images_per_s,data_share,checkpoint_share,seconds,"
        "top1,top5,validation_loss"
    )
    assert first.startswith("1,6,40,1.8181818181818181,") and first.endswith(",1.1,,,")


def test_each_line_is_there_as_soon_as_it_is_told(tmp_path):
    file = tmp_path / "history.csv"
    history = History(file)
    assert read_history(file) == []
    history.epoch(REPORTS[0])
    assert read_history(file) == REPORTS[:1]
    history.close()


def test_a_new_training_begins_the_file_anew(path):
    write(path, REPORTS[:1])
    assert read_history(path) == REPORTS[:1]
    assert list(path.parent.iterdir()) == [path]


def test_a_resumed_training_leaves_the_bytes_of_an_uninterrupted_one(path, tmp_path):
    whole = path.read_bytes()
    write(path, REPORTS[2:], after_epoch=2)
    assert path.read_bytes() == whole


def test_a_last_line_that_was_not_finished_is_left_out(path):
    path.write_bytes(path.read_bytes()[:-5])
    assert read_history(path) == REPORTS[:3]


def test_a_resumed_training_drops_a_line_that_was_not_finished(path):
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    write(path, REPORTS[3:], after_epoch=3)
    assert path.read_bytes() == whole


def test_a_resumed_training_says_what_its_history_lacks(tmp_path, caplog):
    file = tmp_path / "history.csv"
    write(file, REPORTS[:1])
    with caplog.at_level(logging.WARNING):
        write(file, REPORTS[2:], after_epoch=2)
    assert "holds 1 of the 2 epochs" in caplog.text
    assert [r.epoch for r in read_history(file)] == [1, 3, 4]


def test_a_file_saved_by_a_spreadsheet_with_its_line_ends_is_read(path):
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert read_history(path) == REPORTS


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.replace("epoch,", "round,", 1), "its first line is 'round,epochs"),
        (lambda t: "", "its first line is ''"),
        (lambda t: t.replace(",0.06,", ",", 1), "line 2"),
        (lambda t: t.replace(",0.06,", ",much,", 1), "line 2: could not convert.*'much'"),
        (lambda t: t.replace("2,6,80,", "2.5,6,80,", 1), "line 3: invalid literal"),
        (lambda t: t.replace("4,6,160,", "3,6,160,", 1), "line 5: epoch 3 comes after epoch 3"),
        (lambda t: t.replace("1,6,40", '"1,6,40', 1), "unexpected end"),
        (lambda t: t.replace("0.06", "\0"), "history.csv"),
    ],
)
def test_what_is_no_history_is_told_where(path, change, said):
    path.write_text(change(path.read_text()))
    with pytest.raises(RepositoryError, match=said):
        read_history(path)


def test_bytes_that_are_no_text_are_no_history(path):
    path.write_bytes(b"\xff\xfe\n")
    with pytest.raises(RepositoryError, match="not a history of a training"):
        read_history(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(RepositoryError, match=r"nowhere\.csv: cannot be read \(No such file"):
        read_history(tmp_path / "nowhere.csv")


def test_a_history_that_cannot_be_resumed_is_left_as_it_is(path):
    path.write_text("mine\n")
    with pytest.raises(RepositoryError, match="remove it to begin a new one"):
        History(path, after_epoch=2)
    assert path.read_text() == "mine\n"
    assert list(path.parent.iterdir()) == [path]


def test_a_full_disk_is_one_line_and_keeps_the_lines_before(path):
    history = History(path, after_epoch=3)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 20, limits[1]))
    try:
        with pytest.raises(RepositoryError, match=r"history\.csv: cannot be written"):
            history.epoch(REPORTS[3])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        history.close()
    assert read_history(path) == REPORTS[:3]
