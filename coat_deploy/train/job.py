"""A training from end to end: data and recipe in, the folder of a model out."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from coat_deploy.data.dataset import Dataset, Splits, Stream
from coat_deploy.errors import RepositoryError, TrainingError, UsageError
from coat_deploy.json_files import read_json
from coat_deploy.machine import describe
from coat_deploy.model import CONFIG, Model
from coat_deploy.spec import ModelSpec, WeightsRecord
from coat_deploy.train.card_metadata import dataset
from coat_deploy.train.checkpoint import FILE as CHECKPOINT
from coat_deploy.train.checkpoint import Checkpoint, load_checkpoint
from coat_deploy.train.finish import METRICS, RECIPE, Story, write_model
from coat_deploy.train.loop import Training
from coat_deploy.train.losses import LAST_BATCH
from coat_deploy.train.plan import Outcome, Plan
from coat_deploy.train.processes import flushing_denormals
from coat_deploy.train.progress import EpochReport, Watcher
from coat_deploy.train.recipe import Recipe, read_recipe
from coat_deploy.train.records import Chronicle, Dispensable
from coat_deploy.train.start import SCRATCH, begin, plan_spec
from coat_deploy.train.tensorboard import TensorBoard
from coat_deploy.transaction import writing

FOLDER = "training"
"""In the model's folder: the checkpoint, the history and TensorBoard's events."""
HISTORY = "history.csv"
FREE_TO_CHANGE = ("workers", "memory_gib", "checkpoint_minutes", "compile")
"""Fields of a recipe that a resumed training may have otherwise: the result is the same."""


@dataclass(frozen=True)
class Job:
    """What to train, from what, on what, and the model it becomes.

    `preset`, `source`: how the user named recipe and data, for the model card. `base`: the model
    whose weights and preprocessing it begins with, if any. `model_args` as in `ModelSpec`.
    """

    variant: str
    recipe: Recipe
    splits: Splits
    model: Model
    preset: str = ""
    source: str = ""
    base: Model | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        """The spec of the model to be. Raises UsageError."""
        base = self.base.spec.preprocess if self.base else None
        labels = self.splits.train.label_names
        return plan_spec(self.variant, labels, self.recipe, base, self.model_args)

    def finished(self) -> dict[str, Any] | None:
        """Return the metrics of the model where it came of this very training, to its end.

        None where there is no model, or a training under way in its folder.
        Raises: UsageError for a model that came of something else.
        """
        folder = self.model.folder
        if _is_under_way(self.model) or not (folder / CONFIG).exists():
            return None
        if not all((folder / name).is_file() for name in (RECIPE, METRICS)):
            raise _taken(self.model, "which was not trained here")
        metrics = read_json(folder / METRICS, RepositoryError)
        there = {
            **asdict(self.recipe.replace(read_recipe(folder / RECIPE))),
            "variant": self.model.spec.architecture,
            "classes": self.model.spec.label_names,
            "data": metrics.get("data") if isinstance(metrics, dict) else None,
        }
        wanted = {
            **_fixed(self.recipe),
            "variant": self.variant,
            "classes": self.splits.train.label_names,
            "data": dataset(self.source)[0],
        }
        for name, value in wanted.items():
            if there[name] != value:
                how = f"{name}: got {value!r:.80}, expected {there[name]!r:.80}"
                raise _taken(self.model, f"trained otherwise ({how})")
        return dict(metrics)

    def run(
        self,
        accelerator: Accelerator,
        watchers: Sequence[Watcher] = (),
        *,
        resume: bool = False,
        overwrite: bool = False,
        stop: Callable[[], bool] = lambda: False,
    ) -> dict[str, Any]:
        """Train, write the model's folder and return its metrics; see `metrics.json`.

        resume: go on from the last checkpoint, if there is one, and do nothing where the training
            is `finished`; otherwise, what is there is only replaced with `overwrite`, and not
            before the new model is complete.
        stop: asked after every step whether to save and leave.

        Raises: `plan.Stopped`; UsageError, TrainingError, ImageError or WeightsError before
            anything is written for what cannot be trained; RepositoryError.
        """
        first = accelerator.is_main_process
        if first:
            self._settle()
        if resume and not overwrite and (metrics := self.finished()) is not None:
            return metrics
        check_place(self.model, resume=resume, overwrite=overwrite)
        checkpoint = load_checkpoint(self._folder) if resume else None
        with flushing_denormals(), self._making_folder() if first else contextlib.nullcontext():
            training = self._training(accelerator, checkpoint, stop)
            history = self._watched(training, watchers) if first else None
            try:
                outcome = training.run()
            finally:
                for watcher in training.watchers:
                    watcher.close()
            metrics = self._written(outcome, accelerator, history) if history else {}
        accelerator.wait_for_everyone()
        return metrics

    def _watched(self, training: Training, watchers: Sequence[Watcher]) -> Chronicle:
        """Set who watches, the history first, and return it. Raises RepositoryError."""
        step = training.position.step
        if step == 0:
            self._set_aside()
        history = Chronicle(self._folder / HISTORY, step // training.supply.order.steps)
        board = Dispensable(TensorBoard(self._folder, step + 1))
        training.watchers = (history, board, *watchers)
        return history

    def _written(
        self, outcome: Outcome, accelerator: Accelerator, history: Chronicle
    ) -> dict[str, Any]:
        """Write the model and return its metrics. Raises as `write_model`."""
        story = self._story(accelerator.num_processes, history.reports)
        metrics = write_model(self.model, self.spec, outcome, story)
        shutil.rmtree(self._before, ignore_errors=True)
        (self._folder / CHECKPOINT).unlink(missing_ok=True)
        return metrics

    @property
    def _folder(self) -> Path:
        return self.model.folder / FOLDER

    @property
    def _before(self) -> Path:
        return self.model.folder / f".{FOLDER}"

    @contextlib.contextmanager
    def _making_folder(self) -> Iterator[None]:
        """Make the folder of the training; afterwards take away what is not worth keeping.

        Before anything else, so that nobody waits for images to be read that come to nothing.
        Raises: RepositoryError.
        """
        made = [path for path in (self._folder, *self._folder.parents) if not path.exists()]
        with writing(self._folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            self._settle()
            with contextlib.suppress(OSError):  # not empty: something was put there
                for path in made:
                    path.rmdir()

    def _settle(self) -> None:
        """Put the training before back into its place, unless the new one has come to something."""
        worth = (CHECKPOINT, LAST_BATCH)
        if not self._before.exists():
            return
        if any((self._folder / name).exists() for name in worth):
            shutil.rmtree(self._before, ignore_errors=True)
        else:
            with writing(self._folder):
                shutil.rmtree(self._folder, ignore_errors=True)
                os.replace(self._before, self._folder)

    def _set_aside(self) -> None:
        """Begin with an empty folder; what is in it stays aside."""
        with writing(self._folder):
            os.replace(self._folder, self._before)
            self._folder.mkdir()

    def _training(
        self,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None,
        stop: Callable[[], bool],
    ) -> Training:
        """Return the training, at its first step or where the checkpoint was written."""
        if self.splits.validation is None:
            raise UsageError(
                "validation images: there are none. Name a split with --validation-split."
            )
        # What a checkpoint brings need not be fetched first.
        recipe = self.recipe if checkpoint is None else self.recipe.replace({"init": SCRATCH})
        plan = Plan(
            self.spec, begin(self.spec, recipe, self.base), self.recipe,
            self.splits.train, self.splits.validation, self._folder,
            {
                **_fixed(self.recipe),
                "model_args": dict(self.model_args),
                "training images": _fingerprint(self.splits.train),
            },
        )  # fmt: skip
        training = Training(plan, accelerator, stop=stop)
        if checkpoint is not None:
            training.resume(checkpoint)
        steps = set(gather_object([training.position.step]))
        if len(steps) > 1:
            raise TrainingError(
                f"{self._folder}: not all processes find the same checkpoint (they are at steps "
                f"{', '.join(map(str, sorted(steps)))}). Give all of them the same folder, on a "
                "file system that they share."
            )
        return training

    def _story(self, processes: int, history: Sequence[EpochReport]) -> Story:
        began_from = None
        if self.recipe.init != SCRATCH:
            began_from = WeightsRecord(self.recipe.init)
        return Story(
            preset=self.preset,
            source=self.source,
            recipe=self.recipe,
            history=history,
            machine=describe(),
            processes=processes,
            began_from=began_from,
        )


def check_place(model: Model, *, resume: bool, overwrite: bool) -> None:
    """Refuse to write over a model, or a training under way, that is not to be replaced.

    Raises: UsageError.
    """
    if resume or overwrite:
        return
    if _is_under_way(model):
        raise UsageError(
            f"{model.folder / FOLDER}: holds a training that was not finished. Go on with "
            "--resume, begin anew with --overwrite, or choose another --out."
        )
    if (model.folder / CONFIG).exists():
        raise _taken(model)


def _is_under_way(model: Model) -> bool:
    return (model.folder / FOLDER / CHECKPOINT).exists()


def _taken(model: Model, how: str = "") -> UsageError:
    return UsageError(
        f"{model.folder}: is a model already{f', {how}' if how else ''}. Replace it with "
        "--overwrite, or choose another --out."
    )


def _fixed(recipe: Recipe) -> dict[str, Any]:
    """Return the fields of a recipe that decide what comes out."""
    return {name: value for name, value in asdict(recipe).items() if name not in FREE_TO_CHANGE}


def _fingerprint(data: Dataset | Stream) -> str:
    """Return a digest of which images there are, in which order and of which classes.

    By the names of the files alone: a folder may lie elsewhere on the next machine. What a stream
    holds is not known before its end.
    """
    if isinstance(data, Stream):
        return "streamed"
    names = "\0".join(os.path.basename(data.name(index)) for index in range(len(data)))
    digest = hashlib.sha256(names.encode(errors="surrogateescape"))
    digest.update(data.labels.tobytes())
    return digest.hexdigest()[:16]
