"""From what came out of a training to the folder of a model, complete or as it was before."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.json_files import json_bytes
from coat_deploy.machine import Machine
from coat_deploy.model import WEIGHTS, Model
from coat_deploy.network.coat import create_network
from coat_deploy.network.macs import count_macs, count_parameters
from coat_deploy.network.weights import Checkpoint, fit, to_safetensors
from coat_deploy.spec import ModelSpec, WeightsRecord
from coat_deploy.train.card import CardFacts, render_card
from coat_deploy.train.card_metadata import dataset
from coat_deploy.train.curves import draw_confusion, draw_history
from coat_deploy.train.plan import Outcome
from coat_deploy.train.progress import EpochReport
from coat_deploy.train.recipe import Recipe

RECIPE, METRICS, CARD = "recipe.toml", "metrics.json", "README.md"
HISTORY_PICTURE, CONFUSION_PICTURE = "training.png", "confusion.png"
PICTURES = (HISTORY_PICTURE, "training.svg", CONFUSION_PICTURE, "confusion.svg")


@dataclass(frozen=True)
class Story:
    """How a model came to be: what its card and its metrics tell besides its accuracy.

    `preset` and `source` as the user named them; `history` one report an epoch, as far as it is
    known; `processes` took part; `began_from` None from scratch.
    """

    preset: str
    source: str
    recipe: Recipe
    history: Sequence[EpochReport]
    machine: Machine
    processes: int = 1
    began_from: WeightsRecord | None = None


def write_model(model: Model, spec: ModelSpec, outcome: Outcome, story: Story) -> dict[str, Any]:
    """Write everything a trained model is into its folder, at once, and return its metrics.

    Artifacts exported before stay, and are then told to be stale.
    Raises: WeightsError for weights that are not finite; RepositoryError.
    """
    tensors = {key: np.asarray(value) for key, value in outcome.weights.items()}
    # Without the folders above it: a model that is passed on need not tell where it was made.
    source = f"trained on {dataset(story.source)[0]}"
    checkpoint = Checkpoint(fit(tensors, spec, subject=source), WeightsRecord(source))
    metrics = measured(spec, outcome, story)
    with model.staging() as staging:
        staging.write_spec(spec)
        staging.write(WEIGHTS, to_safetensors(checkpoint))
        staging.write(RECIPE, story.recipe.to_toml().encode())
        staging.write(METRICS, json_bytes(metrics))
        for name, picture in pictures(model.name, spec, outcome, story).items():
            staging.write(name, picture)
        staging.write(CARD, render_card(_facts(model.name, spec, outcome, story)).encode())
        staging.commit(None, WeightsRecord(source, None, staging.weights_sha256()))
    return metrics


def measured(spec: ModelSpec, outcome: Outcome, story: Story) -> dict[str, Any]:
    """Return the content of `metrics.json`: accuracy of the weights kept, then time and speed."""
    last = story.history[-1] if story.history else None
    return {
        **outcome.quality.to_json(spec.label_names),
        "data": dataset(story.source)[0],
        "training_images": outcome.images,
        "epochs": last.epoch if last else outcome.epoch,
        "epoch_kept": outcome.epoch,
        "seconds": outcome.seconds,
        "images_per_s": _mean([report.images_per_s for report in story.history]),
        "data_share": _mean([report.data_share for report in story.history]),
        "checkpoint_share": last.checkpoint_share if last else None,
        "processes": story.processes,
        "machine": asdict(story.machine),
    }


def pictures(name: str, spec: ModelSpec, outcome: Outcome, story: Story) -> dict[str, bytes]:
    """Return the pictures of the history and of the confusion matrix, by file name."""
    drawn = {}
    for picture in PICTURES:
        suffix = Path(picture).suffix
        if picture.startswith("training"):
            if story.history:
                drawn[picture] = draw_history(story.history, suffix, name)
        else:
            confusion = outcome.quality.confusion
            drawn[picture] = draw_confusion(confusion, spec.label_names, suffix, name)
    return drawn


def _facts(name: str, spec: ModelSpec, outcome: Outcome, story: Story) -> CardFacts:
    network = create_network(spec.architecture, spec.num_classes, **spec.model_args)
    return CardFacts(
        name=name,
        spec=spec,
        labels=spec.label_names,
        parameters=count_parameters(network),
        macs=count_macs(network, spec.preprocess.input_size),
        recipe=story.recipe,
        preset=story.preset or None,
        weights=story.began_from,
        data=story.source,
        train_images=outcome.images,
        epochs=story.history[-1].epoch if story.history else outcome.epoch,
        seconds=outcome.seconds,
        machine=story.machine.summary(),
        quality=outcome.quality,
        processes=story.processes,
        kept_epoch=outcome.epoch,
        history_picture=HISTORY_PICTURE if story.history else None,
        confusion_picture=CONFUSION_PICTURE,
        recipe_file=RECIPE,
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
