"""The loop: what it learns, where it stops, what it says when it cannot go on."""

import errno
import itertools
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import pytest
import torch

from coat_deploy.errors import TrainingError
from coat_deploy.train.checkpoint import load_checkpoint
from coat_deploy.train.loop import Training
from coat_deploy.train.losses import LAST_BATCH
from coat_deploy.train.plan import Diverged, Outcome, Plan, Stopped
from coat_deploy.train.processes import open_processes
from coat_deploy.train.progress import EpochReport, StepReport

EVERYTHING_DRAWN = {
    "drop_path": 0.1, "rand_augment": 1, "jitter": 0.2, "erase": 0.25, "mixup": 0.2, "cutmix": 1.0,
    "mix_share": 0.5, "crop_min": 0.3, "flip": 0.5, "repeats": 2,
}  # fmt: skip


@dataclass
class Noted:
    """A `Watcher` that remembers, and may say when it is time to stop."""

    steps: list[StepReport] = field(default_factory=list)
    epochs: list[EpochReport] = field(default_factory=list)

    def step(self, report: StepReport) -> None:
        self.steps.append(report)

    def epoch(self, report: EpochReport) -> None:
        self.epochs.append(report)

    def close(self) -> None:
        pass

    @property
    def losses(self) -> list[float]:
        return [report.loss for report in self.steps]


@dataclass
class Trained:
    """A training of a toy: 24 pictures of 3 classes to learn, 12 to evaluate on."""

    toys: ModuleType
    folder: Path

    def training(self, train=None, validation=None, stop=lambda: False, **changes) -> Training:
        recipe = self.toys.recipe(**{"checkpoint_minutes": 100.0, **changes})
        options = {
            "drop_path": recipe.drop_path,
            "gradient_checkpointing": recipe.gradient_checkpointing,
        }
        plan = Plan(
            self.toys.spec(),
            self.toys.network(**options),
            recipe,
            self.toys.Pictures() if train is None else train,
            self.toys.Pictures(12, seed=1) if validation is None else validation,
            self.folder,
        )
        return Training(plan, open_processes(recipe, "cpu"), stop=stop)

    def run(self, **changes) -> tuple[Outcome, Noted]:
        noted = Noted()
        training = self.training(**changes)
        training.watchers = (noted,)
        return training.run(), noted

    def interrupted(self, after: list[int], **changes) -> tuple[Outcome, Noted]:
        """Train, stopping after so many steps each time, and go on from the checkpoint."""
        noted = Noted()
        for number in (*after, None):
            counted = itertools.count(1)
            training = self.training(
                stop=lambda: number is not None and next(counted) == number,  # noqa: B023
                **changes,
            )
            training.watchers = (noted,)
            if (checkpoint := load_checkpoint(self.folder)) is not None:
                training.resume(checkpoint)
            try:
                outcome = training.run()
            except Stopped:
                assert number is not None
        return outcome, noted


@pytest.fixture
def trained(toys, tmp_path) -> Trained:
    return Trained(toys, tmp_path / "training")


def same_bits(one: Outcome, other: Outcome) -> bool:
    return one.weights.keys() == other.weights.keys() and all(
        torch.equal(value, other.weights[name]) for name, value in one.weights.items()
    )


def largest_difference(one: Outcome, other: Outcome) -> float:
    """The largest, but for biases of keys: a softmax over the tokens cancels them, so that their
    gradients are nothing but rounding, and AdamW makes whole steps of it.
    """
    largest = 0.0
    for name, value in one.weights.items():
        differences = (value - other.weights[name]).abs()
        if name.endswith("qkv.bias"):
            differences[len(value) // 3 : 2 * len(value) // 3] = 0
        largest = max(largest, differences.max().item())
    return largest


# ------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize(
    "changes",
    [
        EVERYTHING_DRAWN,
        EVERYTHING_DRAWN | {"accumulate": 2, "clip_norm": 1.0},
        EVERYTHING_DRAWN | {"gradient_checkpointing": True},
        {"precision": "bf16", "drop_path": 0.1},
        {"ema_decay": 0.0, "flip": 0.5},
        {"patience": 2, "crop_min": 0.3},
    ],
    ids=["drawn", "accumulated", "gradient checkpoints", "bf16", "no average", "patience"],
)
def test_stopped_in_mid_epoch_it_goes_on_to_the_same_bits(changes, trained, tmp_path):
    straight, one = trained.run(epochs=3, **changes)
    trained.folder = tmp_path / "again"
    resumed, other = trained.interrupted([1, 2], epochs=3, **changes)
    assert same_bits(straight, resumed)
    assert [e.validation_loss for e in other.epochs] == [e.validation_loss for e in one.epochs]
    assert other.losses == one.losses


def test_images_decoded_by_workers_come_to_the_same_bits_after_a_stop(trained, tmp_path):
    changes = {"memory_gib": 0.0, "workers": 1, "crop_min": 0.3, "flip": 0.5, "epochs": 2}
    straight, _ = trained.run(**changes)
    trained.folder = tmp_path / "again"
    resumed, _ = trained.interrupted([2], **changes)
    assert same_bits(straight, resumed)


def test_workers_or_memory_make_no_difference(trained):
    changes = {"crop_min": 0.3, "flip": 0.5, "epochs": 1}
    out_of_memory, _ = trained.run(**changes)
    decoded, _ = trained.run(memory_gib=0.0, workers=1, **changes)
    assert same_bits(out_of_memory, decoded)


def test_a_stream_goes_on_to_the_same_bits(trained, toys, tmp_path):
    changes = {"train": toys.Reel(toys.Pictures(26)), "crop_min": 0.3, "epochs": 3}
    straight, _ = trained.run(**changes)
    trained.folder = tmp_path / "again"
    resumed, _ = trained.interrupted([4, 3], **changes)
    assert same_bits(straight, resumed)


class Killed(BaseException):
    """Ends a training where nothing of it gets to tidy up what is saved."""


@pytest.mark.parametrize("where", ["_end_epoch", "_compare", "_save_if_asked"])
def test_killed_at_the_edge_of_an_epoch_it_goes_on_to_the_same_bits(
    where, trained, tmp_path, monkeypatch
):
    changes = {"checkpoint_minutes": 0.0, "epochs": 3, "drop_path": 0.1, "patience": 3}
    straight, one = trained.run(**changes)
    trained.folder = tmp_path / "again"
    usual = getattr(Training, where)

    def kill(training: Training, *arguments: object) -> None:
        if training.position.step == 6:
            raise Killed
        usual(training, *arguments)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Training, where, kill)
        trained.run(**changes)
    resumed, other = trained.interrupted([], **changes)
    assert same_bits(straight, resumed)
    assert [report.loss for report in one.epochs] == [report.loss for report in other.epochs][-3:]


def test_a_checkpoint_of_another_training_is_refused_by_what_differs(trained):
    with pytest.raises(Stopped):
        trained.training(stop=lambda: True).run()
    checkpoint = load_checkpoint(trained.folder)
    assert checkpoint is not None
    with pytest.raises(TrainingError, match=r"\(images a step: got 8, expected 4\)"):
        trained.training(batch_size=8).resume(checkpoint)


def test_stopping_tells_the_step_and_how_to_go_on(trained):
    with pytest.raises(Stopped) as caught:
        trained.training(stop=lambda: True).run()
    assert str(caught.value) == (
        f"training: stopped at step 1 of 12 and saved in {trained.folder}. Go on with --resume."
    )


# ------------------------------------------------------------------------------------- learning


def test_the_loss_falls_and_the_pictures_are_told_apart(trained):
    outcome, noted = trained.run(epochs=6)
    assert noted.epochs[-1].loss < 0.5 * noted.epochs[0].loss
    assert outcome.quality.top1.value == 1.0
    assert outcome.epoch == 6


def test_in_bf16_the_loss_falls_as_far(trained):
    _, noted = trained.run(epochs=6, precision="bf16")
    assert noted.epochs[-1].loss < 0.5 * noted.epochs[0].loss


def test_two_batches_added_up_make_the_step_of_one_twice_as_large(trained):
    added, one = trained.run(batch_size=4, accumulate=2, clip_norm=0.1)
    whole, other = trained.run(batch_size=8, clip_norm=0.1)
    assert one.losses == pytest.approx(other.losses, abs=1e-5)
    assert largest_difference(added, whole) < 1e-5


def test_recomputing_blocks_gives_the_same_weights(trained):
    plain, _ = trained.run(**EVERYTHING_DRAWN)
    recomputed, _ = trained.run(**EVERYTHING_DRAWN, gradient_checkpointing=True)
    assert largest_difference(plain, recomputed) < 1e-6


def test_the_seed_decides_everything(trained):
    one, _ = trained.run(**EVERYTHING_DRAWN)
    same, _ = trained.run(**EVERYTHING_DRAWN)
    other, _ = trained.run(**EVERYTHING_DRAWN, seed=1)
    assert same_bits(one, same)
    assert not same_bits(one, other)


def test_the_averaged_weights_are_kept_and_evaluated(trained):
    outcome, noted = trained.run(learning_rate=1.0)
    last, _ = trained.run(learning_rate=1.0, ema_decay=0.0)
    assert largest_difference(outcome, last) > 1e-3
    assert outcome.quality.nll == noted.epochs[-1].validation_loss


def test_patience_stops_early_and_keeps_the_best_epoch(trained, monkeypatch):
    monkeypatch.setattr(Training, "_compare", scored([0.2, 0.6, 0.4, 0.6, 0.9]))
    outcome, noted = trained.run(epochs=9, patience=2)
    assert [report.epoch for report in noted.epochs] == [1, 2, 3, 4]
    assert outcome.epoch == 2
    # Nothing of the rate depends on what comes later.
    monkeypatch.setattr(Training, "_compare", scored([0.2, 0.6]))
    training = trained.training(epochs=9, patience=1, stop=lambda: training.position.step >= 13)
    with pytest.raises(Stopped):
        training.run()
    assert training.best.keys() == outcome.weights.keys()
    assert all(torch.equal(training.best[name], value) for name, value in outcome.weights.items())


def test_the_best_epoch_is_remembered_over_a_stop(trained, monkeypatch, tmp_path):
    monkeypatch.setattr(Training, "_compare", scored([0.9, 0.1, 0.2]))
    straight, _ = trained.run(epochs=3, patience=3)
    trained.folder = tmp_path / "again"
    resumed, _ = trained.interrupted([8], epochs=3, patience=3)
    assert straight.epoch == resumed.epoch == 1
    assert same_bits(straight, resumed)


def scored(scores: list[float]) -> Callable[[Training, float, int], None]:
    usual = Training._compare
    return lambda training, top1, epoch: usual(training, scores[epoch - 1], epoch)


def test_validation_comes_every_so_many_epochs_and_after_the_last(trained):
    _, noted = trained.run(epochs=5, validate_every=2)
    assert [report.epoch for report in noted.epochs if report.top1 is not None] == [2, 4, 5]


def test_a_training_on_crops_of_another_size_is_evaluated_at_its_own(trained):
    _, noted = trained.run(train_size=64)
    assert noted.epochs[-1].top1 is not None


# ---------------------------------------------------------------------------- when it cannot go on


def test_a_loss_that_is_no_number_names_the_images_of_its_step(trained, toys, tmp_path):
    training = trained.training(accumulate=2, learning_rate=0.4)
    noted = Noted()
    training.watchers = (noted,)
    trained.folder.mkdir()
    usual = training.augment
    calls = itertools.count(1)
    seen: list[str] = []

    def poison(images, aspects):
        return usual(images, aspects) * (float("nan") if next(calls) == 6 else 1)

    training.augment = poison
    batches = training.supply.batches

    def remember(epoch, first=0):
        for batch in batches(epoch, first):
            seen.extend(batch.names)
            yield batch

    training.supply.batches = remember
    with pytest.raises(Diverged) as caught:
        training.run()
    assert (trained.folder / LAST_BATCH).read_text().splitlines() == seen[-8:]
    said = str(caught.value)
    assert said.startswith("training: the loss is nan at step 3 (epoch 1, learning rate 0.00417).")
    assert f"Its images: {', '.join(seen[-8:-5])}, ... (all 8 in {trained.folder}" in said
    assert len(noted.steps) == 2


def test_a_step_that_diverged_is_never_saved(trained):
    training = trained.training(checkpoint_minutes=0.0)
    usual = training.augment
    calls = itertools.count(1)
    training.augment = lambda *batch: usual(*batch) * (float("inf") if next(calls) == 4 else 1)
    with pytest.raises(Diverged):
        training.run()
    saved = load_checkpoint(trained.folder)
    assert saved is not None and saved.position.step == 3


def lacking_memory_above(training: Training, most: int) -> None:
    """Let the network fail as PyTorch's allocator on a CPU does when given more images."""
    usual = training.network.forward

    def forward(images):
        if len(images) > most:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:131] . DefaultCPUAllocator: can't allocate memory: "
                "you tried to allocate 68719476736 bytes. Error code 12 (Cannot allocate memory)"
            )
        return usual(images)

    training.network.forward = forward


def test_out_of_memory_names_a_batch_size_that_fits(trained):
    training = trained.training(batch_size=16)
    lacking_memory_above(training, 5)
    with pytest.raises(TrainingError) as caught:
        training.run()
    said = str(caught.value)
    assert said.startswith("training: out of memory with batches of 16 images of 32x32")
    fits = re.search(r"(\d+) would fit", said)
    assert fits is not None and 1 < int(fits[1]) <= 5


def test_out_of_memory_in_the_augmentation_is_told_the_same(trained):
    training = trained.training(batch_size=16)

    def lack(images, aspects):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    training.augment = lack
    with pytest.raises(TrainingError, match="out of memory with batches of 16 images"):
        training.run()


def full_disk(monkeypatch: pytest.MonkeyPatch, saves: range) -> None:
    """Let these of the checkpoints, counted from 1, meet a full disk half way."""
    usual, counted = torch.save, itertools.count(1)

    def save(document, file):
        if next(counted) in saves:
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        usual(document, file)

    monkeypatch.setattr(torch, "save", save)


def test_a_full_disk_keeps_the_last_checkpoint_and_training_goes_on(trained, monkeypatch, caplog):
    full_disk(monkeypatch, range(3, 100))
    with caplog.at_level(logging.WARNING):
        outcome, noted = trained.run(checkpoint_minutes=0.0)
    assert outcome.epoch == 2 and len(noted.steps) == 12
    saved = load_checkpoint(trained.folder)
    assert saved is not None and saved.position.step == 2
    assert [path.name for path in trained.folder.iterdir()] == ["checkpoint.pt"]
    first = caplog.messages[0]
    assert "No space left on device" in first and "the last one is kept" in first
    assert first.endswith("Training goes on meanwhile.")


def test_what_a_full_disk_kept_goes_on_to_the_same_bits(trained, monkeypatch, tmp_path):
    changes = {"checkpoint_minutes": 0.0, "drop_path": 0.1}
    straight, _ = trained.run(**changes)
    trained.folder = tmp_path / "again"
    with monkeypatch.context() as patch:
        full_disk(patch, range(3, 100))
        steps = itertools.count(1)
        with pytest.raises(TrainingError, match="cannot be written"):
            trained.training(stop=lambda: next(steps) == 8, **changes).run()
    resumed, _ = trained.interrupted([], **changes)
    assert same_bits(straight, resumed)
