"""`coat-deploy predict`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.cli.tables import render_table
from coat_deploy.errors import UsageError

if TYPE_CHECKING:
    from coat_deploy.labels import ScoredLabel
    from coat_deploy.model import Model


def predict(
    model: console.ModelArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE", help="Images, or folders of images.")
    ],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Default: the first of onnxruntime and openvino that was exported and is "
            "installed, else eager.",
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Precision of the artifact.")
    ] = None,
    top: Annotated[int, typer.Option(min=1, metavar="N", help="How many labels an image.")] = 5,
    batch: Annotated[str, typer.Option(metavar="N", help="Images a step.")] = "8",
    strict: console.StrictOption = False,
    threads: console.ThreadsOption = None,
    device: console.DeviceOption = "cpu",
    provider: console.ProviderOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Classify images: the likeliest labels, with their probabilities.

    Images are prepared as in validation. An artifact's proof is replayed first; one that is
    stale, corrupt, or does not compute here what it should is refused.
    """
    from coat_deploy.cli.inputs import find
    from coat_deploy.labels import top_labels
    from coat_deploy.model import ArtifactQuery
    from coat_deploy.open import default_target, find_source, open_source
    from coat_deploy.repository import Repository, read_labels
    from coat_deploy.runner import LOGITS, LoadOptions

    batches = console.counts(batch, "batch", 1024)
    found = find(images, batches)
    opened = Repository.open(models).find(model)
    if not opened.spec.num_classes:
        raise UsageError(f"{opened.folder}: has no classifier (num_classes is 0).")
    source = find_source(
        opened, ArtifactQuery(target or default_target(opened, precision), precision)
    )
    labels = read_labels(opened.spec)
    predictions: list[dict[str, Any]] = []
    load = LoadOptions(threads=threads, batch=max(batches), device=device, provider=provider)
    with (
        open_source(source, load) as runner,
        console.progress_bar("predicting", len(found.found)) as advance,
    ):
        for part in found.batches(opened.spec.preprocess.at(source.size)):
            logits = runner.run(part.pixels)[LOGITS]
            for name, row in zip(part.names, logits, strict=True):
                predictions.append({"image": name, "labels": top_labels(row, labels, top)})
            advance(len(part.names))
    if as_json:
        document = {
            "model": opened.name,
            "artifact": source.artifact.name if source.artifact else None,
            "target": source.target,
            "precision": source.precision,
        }
        console.print_json(
            {**document, "predictions": predictions, "skipped": found.skipped()},
        )
    else:
        console.emit(render(predictions, top))
    found.finish(strict)
    if target is None and source.artifact is None:
        console.note(f"{opened.name}: {_why_eager(opened)}; running PyTorch.")
    record = opened.weights_record
    if record and record.source.startswith("random"):
        console.note(f"{opened.name}: its weights are {record.source}; the labels mean nothing.")


def _why_eager(model: "Model") -> str:
    """Return why no artifact was chosen."""
    named = sorted({a.target for a in model.artifacts if not a.features})
    if named:
        return f"{', '.join(named)} alone was exported, which runs where --target names it"
    return "no artifact for logits was exported"


def render(predictions: Sequence[dict[str, Any]], top: int) -> str:
    """Return a line an image, or with several labels each a block: names are of any length."""
    if top == 1:
        rows = [(f"{p['labels'][0]['score']:.1%}", _label(p), p["image"]) for p in predictions]
        return render_table(("score", "label", "image"), rows)
    return "\n".join(f"{p['image']}\n{_block(p['labels'])}" for p in predictions)


def _label(prediction: dict[str, Any]) -> str:
    return str(prediction["labels"][0]["label"])


def _block(labels: Sequence["ScoredLabel"]) -> str:
    return "".join(f"  {label['score']:6.1%}  {label['label']}\n" for label in labels)
