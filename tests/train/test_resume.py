"""A training that was killed or told to stop goes on, to the bits of one that was not.

Every run here is a process of its own, as a user starts it.
"""

import csv
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TIMEOUT = 120
RECIPE = {
    "epochs": 3, "batch-size": 4, "accumulate": 2, "size": 32, "learning-rate": 0.2,
    "warmup-epochs": 1, "clip-norm": 1, "ema-decay": 0.9, "drop-path": 0.1, "repeats": 2,
    "rand-augment": 1, "jitter": 0.2, "rotate": 10, "erase": 0.25, "mixup": 0.2, "cutmix": 1,
    "mix-share": 0.5, "validate-every": 1, "checkpoint-minutes": 0,
}  # fmt: skip
"""Everything that draws and everything that accumulates."""
TIMES = ("images_per_s", "data_share", "checkpoint_share", "seconds")


Result = tuple[bytes, list[dict[str, str]]]


@dataclass(frozen=True)
class Runs:
    """Starts trainings on one folder of pictures; a model is called after its test."""

    data: Path
    models: Path

    def start(self, name: str, *words: str) -> "subprocess.Popen[str]":
        options = [f"--{key}={value}" for key, value in RECIPE.items()]
        return subprocess.Popen(
            [
                sys.executable, "-m", "coat_deploy", "train", "coat_lite_toy",
                "--data", self.data, "--out", name, "--models", self.models, "--threads", "1",
                *options, *words,
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    def stop(self, name: str, number: int, saved: int, *words: str) -> tuple[int, str]:
        """Start a training and send it a signal after it has saved a few times.

        Returns its exit status and what it said.
        """
        process = self.start(name, *words)
        checkpoint = self.models / name / "training" / "checkpoint.pt"
        try:
            seen = [_stamp(checkpoint)]
            deadline = time.monotonic() + TIMEOUT
            while len(seen) <= saved:
                assert process.poll() is None and time.monotonic() < deadline, "it did not go on"
                if (stamp := _stamp(checkpoint)) != seen[-1]:
                    seen.append(stamp)
                time.sleep(0.0005)
            process.send_signal(number)
            _, said = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
            process.communicate()
        return process.returncode, said

    def finish(self, name: str, *words: str) -> str:
        process = self.start(name, *words)
        try:
            _, said = process.communicate(timeout=TIMEOUT)
        finally:
            process.kill()
            process.communicate()
        assert process.returncode == 0, said
        return said

    def result(self, name: str) -> Result:
        """Return the bytes of the weights, and the history without its times."""
        weights = (self.models / name / "model.safetensors").read_bytes()
        with (self.models / name / "training" / "history.csv").open(newline="") as file:
            history = list(csv.DictReader(file))
        return weights, [{k: v for k, v in row.items() if k not in TIMES} for row in history]


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, toys) -> Runs:
    folder = tmp_path_factory.mktemp("resume")
    pictures = toys.Pictures(count=60)
    for i in range(len(pictures)):
        place = folder / "data" / pictures.label_names[pictures.labels[i]] / f"{i:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        pictures.image(i).save(place)
    return Runs(folder / "data", folder / "models")


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs) -> Result:
    """What came of a training in one go; `--resume` finds nothing to go on from, and begins."""
    runs.finish("uninterrupted", "--resume")
    return runs.result("uninterrupted")


@pytest.fixture(scope="module")
def interruptions(runs: Runs) -> list[tuple[int, str]]:
    """Status and last words of one training, ended four times at any moment, then finished."""
    draw = random.Random(1)
    left = []
    for number in (signal.SIGKILL, signal.SIGINT, signal.SIGKILL, signal.SIGTERM):
        words = ["--resume"] if left else []
        left.append(runs.stop("interrupted", number, draw.randint(1, 4), *words))
        assert not (runs.models / "interrupted" / "config.json").exists()
    runs.finish("interrupted", "--resume")
    return left


def test_killed_and_stopped_anywhere_it_ends_with_the_same_bits(runs, uninterrupted, interruptions):
    weights, history = uninterrupted
    assert [row["step"] for row in history] == ["6", "12", "18"]
    assert runs.result("interrupted") == (weights, history)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_the_exit_status_tells_the_signal(number, interruptions):
    status = -number if number == signal.SIGKILL else 128 + number
    assert status in [left for left, _ in interruptions]


@pytest.mark.parametrize("turn", [1, 3])
def test_what_was_saved_is_told_in_one_line(turn, runs, interruptions):
    _, said = interruptions[turn]
    assert said.count("saving; once more to stop at once.\n") == 1
    *_, last = said.splitlines()
    assert last.startswith("coat-deploy: training: stopped at step ")
    place = runs.models / "interrupted" / "training"
    assert last.endswith(f" of 18 and saved in {place}. Go on with --resume.")


def test_resuming_what_is_finished_does_nothing(runs, uninterrupted):
    weights = runs.models / "uninterrupted" / "model.safetensors"
    written = _stamp(weights)
    said = runs.finish("uninterrupted", "--resume")
    assert said == "uninterrupted: was trained to its end before; nothing is left to do.\n"
    assert _stamp(weights) == written
