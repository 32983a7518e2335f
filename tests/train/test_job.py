"""A job: what it leaves behind when it ends well, ends badly, or is started again."""

import csv
import errno
import json
import logging
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from coat_deploy import transaction
from coat_deploy.data.dataset import Splits
from coat_deploy.errors import RepositoryError, TrainingError, UsageError, WeightsError
from coat_deploy.model import Model
from coat_deploy.network.coat import create_network
from coat_deploy.network.weights import load_checkpoint
from coat_deploy.train import finish, history, loop
from coat_deploy.train import job as job_module
from coat_deploy.train.job import Job
from coat_deploy.train.plan import Diverged, Stopped
from coat_deploy.train.processes import open_processes
from coat_deploy.train.recipe import read_recipe

FILES = {
    "README.md", "config.json", "confusion.png", "confusion.svg", "manifest.json", "metrics.json",
    "model.safetensors", "recipe.toml", "training", "training.png", "training.svg",
}  # fmt: skip


@pytest.fixture
def unpictured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes longer than the toys take to train."""
    monkeypatch.setattr(finish, "pictures", lambda *_: {})


@dataclass(frozen=True)
class Jobs:
    """Jobs for one model, and what lies in its folder."""

    toys: Any
    models: Path

    @property
    def folder(self) -> Path:
        return self.models / "toy"

    def job(self, seed: int = 0, **changes: Any) -> Job:
        recipe = self.toys.recipe(**{"checkpoint_minutes": 100.0, **changes})
        splits = Splits(self.toys.Pictures(seed=seed), self.toys.Pictures(12, seed=7))
        return Job("coat_lite_toy", recipe, splits, Model(self.folder), "small", "photographs/toys")

    def run(self, job: Job | None = None, **options: Any) -> dict[str, Any]:
        job = job or self.job()
        return job.run(open_processes(job.recipe, "cpu"), **options)

    def stop(self, job: Job | None = None, after: int = 2, **options: Any) -> None:
        """Run a job and stop it after so many steps."""
        asked: list[int] = []

        def stop() -> bool:
            asked.append(1)
            return len(asked) == after

        with pytest.raises(Stopped):
            self.run(job, stop=stop, **options)

    def content(self) -> dict[str, bytes]:
        """Every file below the models, by its path."""
        files = (path for path in self.models.rglob("*") if path.is_file())
        return {path.relative_to(self.models).as_posix(): path.read_bytes() for path in files}

    def epochs(self) -> list[str]:
        with (self.folder / "training" / "history.csv").open(newline="") as file:
            return [row["epoch"] for row in csv.DictReader(file)]


@pytest.fixture
def jobs(toys: Any, tmp_path: Path, unpictured: None) -> Jobs:
    return Jobs(toys, tmp_path / "models")


def as_read(metrics: dict[str, Any]) -> Any:
    """What comes back of metrics that were written: lists for tuples."""
    return json.loads(json.dumps(metrics))


# ------------------------------------------------------------------------------------ ending well


def test_the_folder_holds_a_whole_model_and_no_checkpoint(toys, tmp_path):
    jobs = Jobs(toys, tmp_path / "models")  # with pictures
    metrics = jobs.run()
    assert {path.name for path in jobs.folder.iterdir()} == FILES
    names = sorted(path.name for path in (jobs.folder / "training").iterdir())
    assert names[-1] == "history.csv" and len(names) == 2
    assert names[0].startswith("events.out.tfevents")
    assert json.loads((jobs.folder / "metrics.json").read_text()) == as_read(metrics)


def test_the_weights_written_score_what_the_metrics_tell(jobs):
    job = jobs.job(epochs=3)
    metrics = jobs.run(job)
    model = Model(jobs.folder)
    network = create_network("coat_lite_toy", 3).eval()
    tensors = load_checkpoint(str(model.weights_path), model.spec).tensors
    network.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    evaluation = job_module.Training(
        job_module.Plan(
            job.spec, network, job.recipe, job.splits.train, job.splits.validation, jobs.folder
        ),
        open_processes(job.recipe, "cpu"),
    )
    quality = evaluation.evaluation.run(network, evaluation.accelerator)
    assert metrics["top1"] == quality.top1.value
    assert metrics["nll"] == pytest.approx(quality.nll, rel=1e-6)


def test_the_recipe_written_is_the_one_that_was_trained(jobs):
    job = jobs.job(seed=3, epochs=1, learning_rate=0.07)
    jobs.run(job)
    assert job.recipe.replace(read_recipe(jobs.folder / "recipe.toml")) == job.recipe


def test_training_begins_with_another_models_weights_and_a_new_head(jobs, toys):
    jobs.run(jobs.job(epochs=4, learning_rate=1.0))
    base = Model(jobs.folder)
    recipe = jobs.job(init="toy", epochs=1, learning_rate=0.0, ema_decay=0.0).recipe
    job = Job(
        "coat_lite_toy", recipe, Splits(toys.Pictures(20, classes=5), toys.Pictures(10, classes=5)),
        Model(jobs.models / "tuned"), "finetune", "photographs", base,
    )  # fmt: skip
    jobs.run(job)
    models = (base, Model(jobs.models / "tuned"))
    old, new = (load_checkpoint(str(m.weights_path), m.spec).tensors for m in models)
    assert new["head.weight"].shape[0] == 5
    for name in old.keys() - {"head.weight", "head.bias"}:
        np.testing.assert_array_equal(new[name], old[name], err_msg=name)


# --------------------------------------------------------------------------------- started again


def test_a_model_is_not_overwritten_unasked(jobs):
    jobs.run()
    before = jobs.content()
    with pytest.raises(UsageError, match="is a model already. Replace it with --overwrite"):
        jobs.run()
    assert jobs.content() == before


def test_an_unfinished_training_is_not_begun_anew_unasked(jobs):
    jobs.stop()
    before = jobs.content()
    with pytest.raises(UsageError, match="holds a training that was not finished. Go on with --re"):
        jobs.run()
    assert jobs.content() == before


def test_resuming_a_finished_training_tells_its_metrics_and_writes_nothing(jobs):
    metrics = jobs.run()
    before = jobs.content()
    assert jobs.run(resume=True) == as_read(metrics)
    assert jobs.content() == before


def test_resuming_with_fewer_workers_is_the_same_training(jobs):
    metrics = jobs.run()
    other = jobs.job(workers=3, memory_gib=1.0)
    assert jobs.run(other, resume=True) == as_read(metrics)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"learning_rate": 0.5}, r"\(learning_rate: got 0.5, expected 0.05\)"),
        ({"drop_path": 0.5}, r"\(drop_path: got 0.5, expected 0.0\)"),
        ({"init": "timm"}, r"\(init: got 'timm', expected 'scratch'\)"),
    ],
)
def test_resuming_with_another_recipe_is_refused_by_the_field(change, said, jobs):
    jobs.stop()
    before = jobs.content()
    with pytest.raises(TrainingError, match=said):
        jobs.run(jobs.job(**change), resume=True)
    assert jobs.content() == before


def test_resuming_on_as_many_other_images_is_refused(jobs, toys):
    jobs.stop()
    other = toys.Pictures()
    other.name = lambda index: f"picture {index + 1}"
    job = replace(jobs.job(), splits=replace(jobs.job().splits, train=other))
    with pytest.raises(TrainingError, match=r"\(training images: got '\w+', expected '\w+'\)"):
        jobs.run(job, resume=True)


def test_resuming_on_the_same_images_in_another_place_goes_on(jobs, toys):
    jobs.stop()
    moved = toys.Pictures()
    moved.name = lambda index: f"/another/node/picture {index}"
    job = replace(jobs.job(), splits=replace(jobs.job().splits, train=moved))
    assert jobs.run(job, resume=True)["epochs"] == 2


def test_resuming_another_training_that_is_finished_is_refused_by_what_differs(jobs):
    jobs.run()
    with pytest.raises(UsageError, match=r"trained otherwise \(epochs: got 3, expected 2\)"):
        jobs.run(jobs.job(epochs=3), resume=True)


def test_resuming_upon_a_model_that_was_not_trained_here_is_refused(jobs):
    jobs.run()
    (jobs.folder / "metrics.json").unlink()
    with pytest.raises(UsageError, match="is a model already, which was not trained here"):
        jobs.run(resume=True)


def test_the_history_of_a_resumed_training_tells_every_epoch_once(jobs):
    jobs.stop(jobs.job(epochs=4), after=14)
    assert jobs.epochs() == ["1", "2"]
    jobs.run(jobs.job(epochs=4), resume=True)
    assert jobs.epochs() == ["1", "2", "3", "4"]


def test_a_checkpoint_that_only_some_processes_find_is_told(jobs, monkeypatch):
    jobs.stop()
    monkeypatch.setattr(job_module, "gather_object", lambda own: [*own, 0])
    with pytest.raises(TrainingError, match=r"\(they are at steps 0, 2\). Give all of them the sa"):
        jobs.run(resume=True)


# -------------------------------------------------------------------------------------- overwriting


def test_the_old_model_stays_until_the_new_one_is_complete(jobs):
    jobs.run()
    before = jobs.content()
    jobs.stop(jobs.job(epochs=1), overwrite=True)
    now = jobs.content()
    kept = {name for name in before if not name.startswith("toy/training/")}
    assert {name: now[name] for name in kept} == {name: before[name] for name in kept}
    jobs.run(jobs.job(epochs=1), resume=True)
    assert jobs.content()["toy/model.safetensors"] != before["toy/model.safetensors"]
    assert jobs.epochs() == ["1"]


@pytest.mark.parametrize("unfinished", [True, False])
def test_what_is_there_stays_whole_if_the_new_training_comes_to_nothing(unfinished, jobs):
    if unfinished:
        jobs.stop()
    else:
        jobs.run()
    before = jobs.content()

    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run(jobs.job(epochs=1), overwrite=True, stop=interrupt)
    assert jobs.content() == before


def test_what_a_kill_left_aside_is_put_back(jobs):
    jobs.stop()
    before = jobs.content()
    training = jobs.folder / "training"
    os.replace(training, jobs.folder / ".training")  # as --overwrite begins
    training.mkdir()
    (training / "history.csv").write_text("epoch\n")
    with pytest.raises(UsageError, match="holds a training that was not finished"):
        jobs.run()
    assert jobs.content() == before


# ------------------------------------------------------------------------------------ ending badly


def test_a_training_that_ends_before_its_first_checkpoint_leaves_nothing(jobs, tmp_path):
    def interrupt() -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        jobs.run(stop=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_reading_images_that_is_interrupted_leaves_nothing(jobs, tmp_path, toys):
    pictures = toys.Pictures()

    def image(index: int) -> None:
        raise KeyboardInterrupt

    pictures.image = image
    job = replace(jobs.job(), splits=Splits(pictures, toys.Pictures(12)))
    with pytest.raises(KeyboardInterrupt):
        jobs.run(job)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "error"),
    [({"batch_size": 32}, UsageError), ({"init": "nowhere.pth"}, WeightsError)],
)
def test_what_cannot_be_trained_writes_nothing(change, error, jobs, tmp_path):
    with pytest.raises(error):
        jobs.run(jobs.job(**change))
    assert list(tmp_path.iterdir()) == []


def test_no_validation_images_is_told_before_anything_is_written(jobs, tmp_path, toys):
    job = replace(jobs.job(), splits=Splits(toys.Pictures(), None))
    with pytest.raises(UsageError, match="validation images: there are none"):
        jobs.run(job)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_told_before_images_are_read(jobs, toys):
    jobs.models.write_text("a file, not a folder")
    pictures = toys.Pictures()
    pictures.image = None
    job = replace(jobs.job(), splits=Splits(pictures, toys.Pictures(12)))
    with pytest.raises(RepositoryError, match="cannot be written"):
        jobs.run(job)


def test_a_loss_that_is_no_number_leaves_the_list_of_images_and_no_model(jobs, monkeypatch):
    monkeypatch.setattr(loop, "soft_cross_entropy", lambda logits, _: logits.sum() * torch.nan)
    with pytest.raises(Diverged) as caught:
        jobs.run()
    listed = jobs.folder / "training" / "last_batch.txt"
    assert len(listed.read_text().splitlines()) == 4
    assert f"(all 4 in {listed})" in str(caught.value)
    assert [path.name for path in jobs.folder.iterdir()] == ["training"]


class FullDisk:
    """A disk that takes no byte more from a moment on."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.full = False
        for module, name in ((transaction.os, "fsync"), (torch, "save")):
            monkeypatch.setattr(module, name, self._guarded(getattr(module, name)))
        usual = history.History.epoch

        def epoch(own: history.History, report: Any) -> None:
            if self.full:
                with transaction.writing(own._path):
                    self._fail()
            usual(own, report)

        monkeypatch.setattr(history.History, "epoch", epoch)

    def _guarded(self, usual: Callable[..., Any]) -> Callable[..., Any]:
        def call(*words: Any) -> Any:
            if self.full:
                self._fail()
            return usual(*words)

        return call

    def _fail(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def when(disk: FullDisk, full: Sequence[int]) -> Callable[[], bool]:
    """Fill the disk after these steps, and empty it after the others."""
    steps: list[int] = []

    def stop() -> bool:
        steps.append(1)
        disk.full = len(steps) in full
        return False

    return stop


def test_a_disk_that_is_full_for_a_while_costs_nothing(jobs, monkeypatch, caplog):
    disk = FullDisk(monkeypatch)
    with caplog.at_level(logging.WARNING):
        jobs.run(jobs.job(epochs=3, checkpoint_minutes=0.0), stop=when(disk, range(4, 7)))
    assert jobs.epochs() == ["1", "2", "3"]
    assert any("history.csv" in told and "No space left" in told for told in caplog.messages)
    assert any("checkpoint.pt" in told for told in caplog.messages)


def test_a_full_disk_at_the_end_keeps_the_old_model_and_the_last_checkpoint(jobs, monkeypatch):
    jobs.run()
    before = jobs.content()
    disk = FullDisk(monkeypatch)
    job = jobs.job(epochs=3, checkpoint_minutes=0.0)
    with pytest.raises(RepositoryError, match="No space left on device"):
        jobs.run(job, overwrite=True, stop=when(disk, range(10, 99)))
    now = jobs.content()
    kept = {name for name in before if not name.startswith("toy/training/")}
    assert {name: now[name] for name in kept} == {name: before[name] for name in kept}
    disk.full = False
    metrics = jobs.run(job, resume=True)
    assert metrics["epochs"] == 3
    assert jobs.epochs() == ["1", "2", "3"]
