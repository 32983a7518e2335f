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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

TIMEOUT = 120
RECIPE = {
    "epochs": 3, "batch-size": 4, "accumulate": 2, "size": 32, "learning-rate": 0.2,
    "warmup-epochs": 1, "clip-norm": 1, "ema-decay": 0.9, "drop-path": 0.1, "repeats": 2,
    "rand-augment": 1, "jitter": 0.2, "rotate": 10, "erase": 0.25, "mixup": 0.2, "cutmix": 1,
    "mix-share": 0.5, "validate-every": 1, "checkpoint-minutes": 0,
}  # fmt: skip
"""Everything that draws and everything that accumulates."""
STEPS = 18
TIMES = ("images_per_s", "data_share", "checkpoint_share", "seconds")


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

    def result(self, name: str) -> tuple[bytes, list[dict[str, str]]]:
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
def runs(tmp_path_factory: pytest.TempPathFactory, toys) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("resume")
    pictures = toys.Pictures(count=60)
    for i in range(len(pictures)):
        place = folder / "data" / pictures.label_names[pictures.labels[i]] / f"{i:02}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        picture: Image.Image = pictures.image(i)
        picture.save(place)
    yield Runs(folder / "data", folder / "models")


@pytest.fixture(scope="module")
def uninterrupted(runs: Runs) -> tuple[bytes, list[dict[str, str]]]:
    runs.finish("uninterrupted")
    result = runs.result("uninterrupted")
    assert [row["step"] for row in result[1]] == ["6", "12", str(STEPS)]
    return result


def test_killed_twice_anywhere_it_ends_with_the_same_bits(runs, uninterrupted):
    draw = random.Random(1)
    for words in ((), ("--resume",)):
        status, said = runs.stop("killed", signal.SIGKILL, draw.randint(1, 7), *words)
        assert status == -signal.SIGKILL, said
        assert not (runs.models / "killed" / "config.json").exists()
    runs.finish("killed", "--resume")
    assert runs.result("killed") == uninterrupted


def test_ctrl_c_and_sigterm_save_first_and_resuming_gives_the_same_bits(runs, uninterrupted):
    folder = runs.models / "stopped" / "training"
    for number, words in ((signal.SIGINT, ()), (signal.SIGTERM, ("--resume",))):
        status, said = runs.stop("stopped", number, 2, *words)
        assert status == 128 + number, said
        *_, noted, last = said.splitlines()
        assert noted == "saving; once more to stop at once."
        assert last.startswith("coat-deploy: training: stopped at step ")
        assert last.endswith(f" of {STEPS} and saved in {folder}. Go on with --resume.")
    runs.finish("stopped", "--resume")
    assert runs.result("stopped") == uninterrupted


def test_resuming_what_never_began_begins_it_and_what_is_finished_does_nothing(
    runs, uninterrupted
):
    runs.finish("first", "--resume")
    assert runs.result("first") == uninterrupted
    written = _stamp(runs.models / "first" / "model.safetensors")
    said = runs.finish("first", "--resume")
    assert said == "first: was trained to its end before; nothing is left to do.\n"
    assert _stamp(runs.models / "first" / "model.safetensors") == written
