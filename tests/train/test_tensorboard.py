"""Event files, read back by the format's definition: TFRecords of `Event` messages."""

import math
import resource
import struct
import sys
import time
from collections import defaultdict
from pathlib import Path

import pytest

from coat_deploy.errors import BackendMissing, RepositoryError
from coat_deploy.train.progress import EpochReport, StepReport
from coat_deploy.train.tensorboard import MAX_POINTS, TensorBoard

STEPS, EPOCHS = 8, 2


@pytest.fixture(autouse=True)
def _needs_tensorboardx() -> None:
    pytest.importorskip("tensorboardX")


def step(number: int, steps: int = STEPS) -> StepReport:
    return StepReport(number, steps, 1, EPOCHS, 1 / number, 0.1 * number, 64, 0.5, 0.125)


def epoch(number: int, top1: float | None = None) -> EpochReport:
    extra = () if top1 is None else (top1, 0.9, 0.7)
    return EpochReport(number, EPOCHS, number * 4, 1.5, 0.1, 128.0, 0.25, 0.01, 9.0, *extra)


def crc32c(data: bytes) -> int:
    """Castagnoli's checksum, bit by bit: RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> int:
    crc = crc32c(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def events(folder: Path):
    """Every event of a folder's files, in the order in which TensorBoard reads them."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("*tfevents*")):
        data = path.read_bytes()
        while data:
            length, sum_of_length = struct.unpack_from("<QI", data)
            body = data[12 : 12 + length]
            assert sum_of_length == masked(data[:8])
            assert struct.unpack_from("<I", data, 12 + length)[0] == masked(body)
            yield Event.FromString(body)
            data = data[16 + length :]


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard shows: a session that starts at a step purges what was there from it on."""
    from tensorboardX.proto.event_pb2 import SessionLog

    shown: dict[str, dict[int, float]] = defaultdict(dict)
    for event in events(folder):
        if event.HasField("session_log") and event.session_log.status == SessionLog.START:
            for points in shown.values():
                for number in [n for n in points if n >= event.step]:
                    del points[number]
        for value in event.summary.value:
            shown[value.tag][event.step] = value.simple_value
    return shown


def write(folder: Path, *reports: StepReport | EpochReport, first_step: int = 1) -> None:
    board = TensorBoard(folder, first_step)
    for report in reports:
        if isinstance(report, StepReport):
            board.step(report)
        else:
            board.epoch(report)
    board.close()


def test_the_checksum_here_is_the_standards():
    assert crc32c(b"123456789") == 0xE3069283


def test_steps_and_epochs_are_read_back(tmp_path):
    write(tmp_path, *map(step, range(1, 5)), epoch(1), *map(step, range(5, 9)), epoch(2, top1=0.5))
    shown = curves(tmp_path)
    assert shown["train/loss"] == pytest.approx({n: 1 / n for n in range(1, 9)})
    assert shown["train/learning_rate"] == pytest.approx({n: 0.1 * n for n in range(1, 9)})
    assert set(shown["train/images_per_s"].values()) == {128.0}
    assert set(shown["train/data_share"].values()) == {0.25}
    assert shown["train/epoch"] == {4: 1, 8: 2}
    assert shown["epoch/loss"] == {4: 1.5, 8: 1.5}
    assert shown["validation/top1"] == {8: 0.5}
    assert shown["validation/top5"] == pytest.approx({8: 0.9})
    assert shown["validation/loss"] == pytest.approx({8: 0.7})


def test_a_resumed_training_drops_what_it_does_again(tmp_path):
    write(tmp_path, *map(step, range(1, 8)), epoch(1))
    write(tmp_path, step(5), first_step=5)
    shown = curves(tmp_path)
    assert sorted(shown["train/loss"]) == [1, 2, 3, 4, 5]
    assert sorted(shown["train/epoch"]) == [4]
    assert len(list(tmp_path.iterdir())) == 2


def test_a_new_training_in_the_same_folder_drops_the_old_one(tmp_path):
    write(tmp_path, step(1), step(2))
    write(tmp_path, step(1))
    assert sorted(curves(tmp_path)["train/loss"]) == [1]


def test_every_point_has_the_time_it_was_written(tmp_path):
    before = time.time()
    write(tmp_path, step(1), epoch(1))
    times = [event.wall_time for event in events(tmp_path)]
    assert before <= times[0] and times == sorted(times) and times[-1] <= time.time()


def test_a_file_begins_with_the_formats_version(tmp_path):
    write(tmp_path)
    assert next(events(tmp_path)).file_version == "brain.Event:2"


def test_an_epoch_is_there_before_the_file_is_closed(tmp_path):
    board = TensorBoard(tmp_path)
    board.step(step(1))
    board.epoch(epoch(1, top1=0.25))
    assert curves(tmp_path)["validation/top1"] == {4: 0.25}
    board.close()


def test_very_many_steps_are_thinned_and_the_last_is_kept(tmp_path):
    steps = 3 * MAX_POINTS + 1
    write(tmp_path, *(step(n, steps) for n in (1, 2, 3, 4, 6, steps)))
    assert sorted(curves(tmp_path)["train/loss"]) == [3, 6, steps]


def test_a_step_that_took_no_time_is_no_division_by_zero(tmp_path):
    write(tmp_path, StepReport(1, 1, 1, 1, 1.0, 0.1, 64, 0.0, 0.0))
    assert math.isfinite(curves(tmp_path)["train/images_per_s"][1])


def test_a_full_disk_is_one_line_and_no_endless_wait(tmp_path):
    board = TensorBoard(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, limits[1]))
    try:
        with pytest.raises(RepositoryError, match="tfevents.*cannot be written"):
            for _ in range(100):
                board.epoch(epoch(1, top1=0.5))
        board.close()  # says nothing more
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RepositoryError, match=r"file/runs: cannot be written"):
        TensorBoard(tmp_path / "file" / "runs")


def test_without_tensorboardx_the_command_to_install_it_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX.proto.event_pb2", None)
    with pytest.raises(BackendMissing, match=r'pip install "coat-deploy\[train\]"'):
        TensorBoard(tmp_path)
    assert not list(tmp_path.iterdir())
