import os
import pty
import re
import select
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from coat_deploy.cli import training_progress as progress
from coat_deploy.cli.training_progress import Pace, TrainingBar, TrainingLines, epoch_line
from coat_deploy.train.progress import EpochReport, StepReport


class Clock:
    """A clock that stands still until it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def step(number: int, seconds: float = 1.0, steps: int = 100, loss: float = 2.0) -> StepReport:
    return StepReport(number, steps, 1, 2, loss, 0.1, 64, seconds, seconds / 4)


def epoch(number: int, top1: float | None = None, epochs: int = 20) -> EpochReport:
    measured = () if top1 is None else (top1, 0.9, 0.7)
    return EpochReport(number, epochs, number, 1.23456, 0.1, 812.4, 0.06, 0, 3723.0, *measured)


def test_an_epoch_is_a_line_of_loss_and_time():
    assert epoch_line(epoch(3)) == "epoch  3/20  loss 1.2346  1:02:03"


def test_an_epoch_that_was_evaluated_tells_its_accuracy():
    line = epoch_line(epoch(10, top1=0.5))
    assert line == "epoch 10/20  loss 1.2346  validation 0.7000  top-1 50.00%  1:02:03"


def told(capsys: pytest.CaptureFixture[str]) -> list[int]:
    captured = capsys.readouterr()
    assert captured.out == ""
    return [int(n) for n in re.findall(r"^epoch +(\d+)/", captured.err, re.MULTILINE)]


def test_a_log_has_a_line_every_few_seconds(capsys):
    clock = Clock()
    lines = TrainingLines(clock)
    for number in range(1, 11):
        lines.epoch(epoch(number))
        clock.now += 2
    assert told(capsys) == [1, 4, 7, 10]


def test_a_log_always_tells_accuracies_and_the_last_epoch(capsys):
    lines = TrainingLines(Clock())
    for number in range(1, 21):
        lines.epoch(epoch(number, top1=0.5 if number in (7, 8) else None))
    assert told(capsys) == [1, 7, 8, 20]


def test_a_line_of_a_log_tells_speed_data_and_time_left(capsys):
    clock = Clock()
    lines = TrainingLines(clock)
    lines.step(step(1))
    clock.now += 90
    lines.step(step(10))
    lines.epoch(epoch(1))
    assert capsys.readouterr().err == (
        "epoch  1/20  loss 1.2346  1:02:03  (812 images/s, data 6%, 0:15:00 left)\n"
    )


def test_the_last_line_of_a_log_tells_of_no_time_left(capsys):
    lines = TrainingLines(Clock())
    lines.epoch(epoch(20))
    lines.close()
    assert "left" not in capsys.readouterr().err


def test_nobody_reading_a_log_does_no_harm():
    code = (
        "import os\n"
        "from coat_deploy.cli.training_progress import training_progress\n"
        "from coat_deploy.train.progress import EpochReport\n"
        "shown = training_progress()\n"
        "shown.epoch(EpochReport(1, 1, 1, 1.0, 0.1, 1.0, 0.0, 0.0, 1.0)); shown.close()\n"
        "os._exit(7)\n"
    )
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run([sys.executable, "-c", code], stderr=theirs, timeout=60)
    os.close(theirs)
    assert done.returncode == 7


def test_time_left_counts_what_lies_between_steps():
    clock = Clock()
    pace = Pace(clock)
    for number in range(1, 12):
        pace.add(step(number, seconds=0.1))
        clock.now += 2
    clock.now -= 2
    assert pace.left() == "0:02:58"


def test_steps_told_all_at_once_do_not_shorten_the_time_left():
    pace = Pace(Clock())
    for number in range(1, 11):
        pace.add(step(number, seconds=3.0))
    assert pace.left() == "0:04:30"


def test_a_resumed_training_is_paced_by_its_own_steps():
    clock = Clock()
    pace = Pace(clock)
    pace.add(step(51))
    clock.now += 40
    pace.add(step(61))
    assert pace.left() == "0:02:36"


def test_the_bar_tells_means_of_the_last_steps():
    pace = Pace(Clock())
    for number in range(1, 51):
        pace.add(step(number, loss=100.0))
    for number in range(51, 101):
        pace.add(step(number, seconds=0.5, loss=2.0))
    assert pace.told() == "loss 2.000, 128 images/s, data 25%, 0:00:00 left"


def test_before_the_first_step_the_time_left_is_not_known():
    assert Pace(Clock()).left() == "?"


@pytest.mark.parametrize(
    ("terminal", "kind", "shown"),
    [
        (True, "xterm", TrainingBar),
        (True, "dumb", TrainingLines),
        (False, "xterm", TrainingLines),
    ],
)
def test_a_bar_is_for_terminals_that_can_move_it(terminal, kind, shown, monkeypatch):
    monkeypatch.setenv("TERM", kind)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: terminal)
    assert type(progress.training_progress()) is shown


SHOW = """
import logging, sys, time
from coat_deploy.cli import console
from coat_deploy.cli.training_progress import training_progress
from coat_deploy.train.progress import EpochReport, StepReport
console.configure(debug=False, verbose=False)
shown = training_progress()
for step in range(1, 5):
    shown.step(StepReport(step, 8, 1, 2, 2.0, 0.1, 64, 0.1, 0.01))
    time.sleep(0.3)
logging.getLogger("coat_deploy").warning("an [odd] image")
shown.epoch(EpochReport(1, 2, 4, 1.5, 0.1, 640.0, 0.1, 0.0, 9.0, 0.25, 0.5, 1.0))
time.sleep(0.3)
shown.close()
shown.epoch(EpochReport(2, 2, 8, 1.25, 0.1, 640.0, 0.1, 0.0, 18.0))
logging.getLogger("coat_deploy").warning("afterwards")
console.emit("the result\\n")
"""


@pytest.fixture(scope="module")
def shown() -> Iterator[str]:
    """What a terminal of 100 columns gets to see."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "NO_COLOR": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", SHOW], stdout=subprocess.PIPE, stderr=theirs, env=environment
    )
    os.close(theirs)
    content = b""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if select.select([ours], [], [], 0.1)[0]:
            try:
                content += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
        elif process.poll() is not None:
            break
    os.close(ours)
    assert process.communicate(timeout=10)[0] == b"the result\n"
    assert process.returncode == 0
    yield content.decode()


def plain(shown: str) -> list[str]:
    """The lines that were written, without what moves the cursor."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown)
    return [line.strip() for line in re.split(r"[\r\n]+", text)]


def test_a_terminal_shows_epoch_loss_speed_data_and_time_left(shown):
    bar = [line for line in plain(shown) if "epoch 1/2" in line and "50%" in line]
    assert bar and re.search(r"loss 2\.000, 640 images/s, data 10%, 0:00:\d\d left$", bar[-1])


def test_lines_of_epochs_and_logs_stay_above_the_bar(shown):
    lines = plain(shown)
    assert "an [odd] image" in lines
    assert "epoch 1/2  loss 1.5000  validation 1.0000  top-1 25.00%  0:00:09" in lines


def test_after_closing_the_bar_is_gone_and_the_cursor_back(shown):
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
    assert plain(shown)[-3:] == ["epoch 2/2  loss 1.2500  0:00:18", "afterwards", ""]


def test_elsewhere_there_are_plain_lines_on_stderr():
    done = subprocess.run([sys.executable, "-c", SHOW], capture_output=True, text=True, timeout=60)
    assert done.stdout == "the result\n"
    lines = done.stderr.splitlines()
    assert lines[0] == "an [odd] image"
    assert lines[1].startswith(
        "epoch 1/2  loss 1.5000  validation 1.0000  top-1 25.00%  0:00:09  ("
    )
    assert lines[2:] == ["epoch 2/2  loss 1.2500  0:00:18  (640 images/s, data 10%)", "afterwards"]
    assert "\x1b" not in done.stderr
