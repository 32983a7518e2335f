"""Two processes, started by torchrun, train as one does with batches twice as large.

They meet over gloo. Nothing that draws is on: each process draws its own.
"""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import psutil  # comes with Accelerate
import pytest

from coat_deploy.data.sources import open_splits
from coat_deploy.model import Model
from coat_deploy.network.weights import load_checkpoint
from coat_deploy.train.job import Job
from coat_deploy.train.processes import open_processes
from coat_deploy.train.progress import EpochReport, StepReport

pytestmark = pytest.mark.slow

TIMEOUT = 120
RECIPE = {
    "epochs": 3, "batch_size": 4, "learning_rate": 0.1, "warmup_epochs": 1.0, "clip_norm": 1.0,
    "drop_path": 0.0, "checkpoint_minutes": 0.0,
}  # fmt: skip


@dataclass(frozen=True)
class Ran:
    status: int
    out: str
    err: str

    @property
    def lines(self) -> list[str]:
        """What the command itself said; launchers are talkative."""
        return [line for line in self.err.splitlines() if line.startswith("coat-deploy: ")]


Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, toys) -> Path:
    """A folder with pictures in `data`, where models go, too."""
    folder = tmp_path_factory.mktemp("together")
    pictures = toys.Pictures(count=60)
    for i in range(len(pictures)):
        file = folder / "data" / pictures.label_names[pictures.labels[i]] / f"{i:02}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        pictures.image(i).save(file)
    return folder


@pytest.fixture(scope="module")
def recipe(toys):
    return toys.recipe(**RECIPE)


@pytest.fixture(scope="module")
def launch(place: Path, recipe) -> Iterator[Launch]:
    """Start a training in two processes; whatever is left of them is ended."""
    (place / "recipe.toml").write_text(recipe.to_toml())
    started: list[subprocess.Popen[str]] = []

    def start(
        name: str, *words: str, program: Sequence[str] = ("-m", "coat_deploy")
    ) -> "subprocess.Popen[str]":
        process = subprocess.Popen(
            [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", *program, "train", "coat_lite_toy",
                "--data", place / "data", "--out", name, "--models", place / "models",
                "--recipe", place / "recipe.toml", "--json", *words,
            ],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        signal_all(process, signal.SIGKILL)
        process.communicate(timeout=TIMEOUT)


def signal_all(process: "subprocess.Popen[str]", number: int) -> None:
    """Send a signal to a launcher and to those it launched, each in a session of its own."""
    if process.poll() is None:
        for each in (*psutil.Process(process.pid).children(recursive=True), process):
            each.send_signal(number)


def ended(process: "subprocess.Popen[str]") -> Ran:
    out, err = process.communicate(timeout=TIMEOUT)
    return Ran(process.returncode, out, err)


@pytest.fixture(scope="module")
def two(launch: Launch) -> Ran:
    ran = ended(launch("two"))
    assert ran.status == 0, ran.err
    return ran


class Noted:
    def __init__(self) -> None:
        self.losses: list[float] = []

    def step(self, report: StepReport) -> None:
        self.losses.append(report.loss)

    def epoch(self, report: EpochReport) -> None:
        pass

    def close(self) -> None:
        pass


def weights(model: Model) -> dict[str, np.ndarray]:
    """The weights by key, without the biases of keys.

    A softmax over the tokens cancels them, so that their gradients are nothing but rounding, of
    which AdamW makes whole steps.
    """
    found = dict(load_checkpoint(str(model.weights_path), model.spec).tensors)
    for name in [name for name in found if name.endswith("qkv.bias")]:
        found[name] = np.delete(found[name].reshape(3, -1), 1, axis=0)
    return found


def history(model: Model) -> list[dict[str, str]]:
    with (model.folder / "training" / "history.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_two_processes_train_as_one_with_the_doubled_batch(two, place, recipe):
    both = Model(place / "models" / "two")
    one = Model(place / "models" / "one")
    doubled = recipe.replace({"batch_size": 8, "checkpoint_minutes": 60.0})
    job = Job("coat_lite_toy", doubled, open_splits(str(place / "data")), one)
    job.run(open_processes(doubled, "cpu"))
    for ours, theirs in zip(history(both), history(one), strict=True):
        assert ours["step"] == theirs["step"]
        assert float(ours["learning_rate"]) == float(theirs["learning_rate"])
        for name in ("loss", "validation_loss"):
            assert float(ours[name]) == pytest.approx(float(theirs[name]), abs=1e-5)
    expected = weights(one)
    for name, values in weights(both).items():
        np.testing.assert_allclose(values, expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_only_the_first_process_prints(two):
    assert json.loads(two.out)["processes"] == 2
    assert two.err.count("epoch 1/3") == 1
    assert two.err.count("epoch 3/3") == 1


def test_a_whole_group_told_to_end_saves_and_resumes_to_the_same_bits(two, launch, place):
    process = launch("stopped")
    checkpoint = place / "models" / "stopped" / "training" / "checkpoint.pt"
    deadline = time.monotonic() + TIMEOUT
    while not checkpoint.exists():
        assert process.poll() is None and time.monotonic() < deadline, ended(process)
        time.sleep(0.001)
    # As a cluster does it: each process gets the signal, and again from its launcher.
    signal_all(process, signal.SIGTERM)
    ran = ended(process)
    assert ran.status != 0 and ran.out == ""
    assert len(ran.lines) == 1, ran.err
    assert "Go on with --resume." in ran.lines[0]
    resumed = ended(launch("stopped", "--resume"))
    assert resumed.status == 0, resumed.err
    after, before = (
        (place / "models" / name / "model.safetensors").read_bytes() for name in ("stopped", "two")
    )
    assert after == before


def test_too_few_images_for_the_processes_is_told_once(launch, place):
    ran = ended(launch("few", "--batch-size", "40"))
    assert ran.status != 0 and ran.out == ""
    assert len(ran.lines) == 1, ran.err
    assert "(got 54, expected at least 80: 40 images a batch x 2 processes)" in ran.lines[0]
    assert not (place / "models" / "few").exists()


LACKING_MEMORY = """
import os
from coat_deploy.cli.app import main
from coat_deploy.network.coat import CoaT

forward = CoaT.forward

def lacking(network, images):
    if len(images) > 2 and os.environ["RANK"] == "1":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate")
    return forward(network, images)

CoaT.forward = lacking
main()
"""


def test_memory_that_runs_out_in_one_process_is_told_by_it_and_ends_both(launch, place):
    script = place / "lacking_memory.py"
    script.write_text(LACKING_MEMORY)
    ran = ended(launch("lacking", program=[str(script)]))
    assert ran.status != 0 and ran.out == ""
    assert "Traceback" not in ran.err.partition("torch/distributed/elastic")[0]
    said, *others = ran.lines
    assert said.startswith("coat-deploy: process 1: training: out of memory with batches of 4")
    assert all("another process ended" in line for line in others) and len(others) <= 1
    assert not (place / "models" / "lacking").exists()
