"""One training of a study: a cell and a seed, in a process of its own."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from coat_deploy.data.options import DataOptions
from coat_deploy.data.sources import open_splits
from coat_deploy.errors import UsageError
from coat_deploy.study.cells import Cell
from coat_deploy.train.recipe import Recipe

STUDY_FIELDS: Mapping[str, Any] = {
    "epochs": 20, "mix_share": 0.0, "weight_decay": 0.05, "drop_path": 0.05,
    "validate_every": 100_000, "precision": "fp32",
}  # fmt: skip
"""What the tables' trainings change in the preset `small`: short ones, so that what a part of the
network is worth shows in minutes; mixing only pays in long trainings. In fp32, whatever machine
repeats them."""

_NO_MATTER = ("workers", "memory_gib", "checkpoint_minutes", "validate_every")


@dataclass(frozen=True)
class Trial:
    """What to train, and on what; `recipe.seed` tells the trials of a cell apart."""

    cell: Cell
    recipe: Recipe
    source: str
    options: DataOptions = DataOptions()

    def key(self) -> str:
        """Return a digest of everything that decides the result."""
        recipe = {k: v for k, v in asdict(self.recipe).items() if k not in _NO_MATTER}
        parts = [asdict(self.cell), recipe, self.source, asdict(self.options)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def run_trial(trial: Trial, threads: int) -> dict[str, Any]:
    """Train and return what a record holds of it: the key, the cell, the seed, the accuracy.

    threads: compute threads, set for the whole process.
    Raises: UsageError, ImageError, TrainingError as training does.
    """
    from coat_deploy.train.loop import Training
    from coat_deploy.train.plan import Plan
    from coat_deploy.train.processes import flushing_denormals, open_processes
    from coat_deploy.train.start import SCRATCH, plan_spec

    splits = open_splits(trial.source, trial.options)
    if splits.validation is None:
        raise UsageError(f"{trial.source}: has no images to evaluate on. Name a split.")
    if trial.recipe.init != SCRATCH:
        raise UsageError(f"init: a study trains from scratch (got '{trial.recipe.init}').")
    processes = open_processes(trial.recipe, "auto", threads)
    labels = splits.train.label_names
    spec = plan_spec(
        trial.cell.variant.name, labels, trial.recipe, model_args=dict(trial.cell.model_args)
    )
    with flushing_denormals(), TemporaryDirectory(prefix="coat-study-") as folder:
        network = trial.cell.network(len(labels), trial.recipe)
        plan = Plan(spec, network, trial.recipe, splits.train, splits.validation, Path(folder))
        outcome = Training(plan, processes).run()
    top1 = outcome.quality.top1
    return {
        "key": trial.key(),
        "group": trial.cell.group,
        "cell": trial.cell.name,
        "seed": trial.recipe.seed,
        "top1": top1.value,
        "correct": top1.correct,
        "images": top1.total,
        "nll": outcome.quality.nll,
        "training_images": outcome.images,
        "epochs": trial.recipe.epochs,
        "seconds": outcome.seconds,
        "source": trial.source,
    }
