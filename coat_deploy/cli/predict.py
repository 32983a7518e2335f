"""`coat-deploy predict`."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.cli.tables import render_table
from coat_deploy.errors import UsageError

if TYPE_CHECKING:
    from coat_deploy.cli.inputs import Images
    from coat_deploy.labels import ScoredLabel
    from coat_deploy.model import Model
    from coat_deploy.open import Source
    from coat_deploy.runner import LoadOptions

FOLDERS = "Huge folders"


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
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Write the labels of one folder of images into Parquet files here. The same "
            "command again goes on where an earlier one ended.",
            rich_help_panel=FOLDERS,
        ),
    ] = None,
    engine: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="local: this process. ray: Ray Data, on all cores or a cluster.",
            rich_help_panel=FOLDERS,
        ),
    ] = "local",
    workers: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Processes of Ray, --threads each (then 1 by default). Default: as many as "
            "there is room for.",
            rich_help_panel=FOLDERS,
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="A Ray that runs, of which this machine is a node, or auto. Default: "
            "$RAY_ADDRESS, else one is started here.",
            rich_help_panel=FOLDERS,
        ),
    ] = None,
    per_file: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            help="Images a Parquet file: what a worker that is killed does again. Default: 16 "
            "to 512, by their number.",
            rich_help_panel=FOLDERS,
        ),
    ] = None,
    threads: console.ThreadsOption = None,
    device: console.DeviceOption = "cpu",
    provider: console.ProviderOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Classify images: the likeliest labels, with their probabilities.

    Images are prepared as in validation. An artifact's proof is replayed first; one that is
    stale, corrupt, or does not compute here what it should is refused.

    With --out every image of a folder becomes a row of a Parquet file, also one that cannot be
    read, with the reason; a run that was killed is gone on with by the same command.
    """
    from coat_deploy.classifier import Classifier
    from coat_deploy.cli.inputs import find
    from coat_deploy.cli.labelling import label_folder, settle
    from coat_deploy.model import ArtifactQuery
    from coat_deploy.open import default_target, find_source
    from coat_deploy.repository import Repository
    from coat_deploy.runner import LoadOptions

    batches = console.counts(batch, "batch", 1024)
    how = settle(engine, out, per_file, workers, address)
    found = find(images, batches) if how is None else None
    opened = Repository.open(models).find(model)
    if not opened.spec.num_classes:
        raise UsageError(f"{opened.folder}: has no classifier (num_classes is 0).")
    source = find_source(
        opened, ArtifactQuery(target or default_target(opened, precision), precision)
    )
    load = LoadOptions(threads=threads, batch=max(batches), device=device, provider=provider)
    if found is not None:
        _list_labels(found, source, load, top, strict, as_json)
    elif how is not None:
        classifier = Classifier(source, replace(load, threads=how.threads(threads)), top)
        label_folder(images, classifier, how, strict, as_json)
    if target is None and source.artifact is None:
        console.note(f"{opened.name}: {_why_eager(opened)}; running PyTorch.")
    record = opened.weights_record
    if record and record.source.startswith("random"):
        console.note(f"{opened.name}: its weights are {record.source}; the labels mean nothing.")


def _list_labels(
    found: "Images",
    source: "Source",
    load: "LoadOptions",
    top: int,
    strict: bool,
    as_json: bool,
) -> None:
    """Classify images and print their labels."""
    from coat_deploy.open import open_source
    from coat_deploy.processing import Processing
    from coat_deploy.runner import LOGITS

    processing = Processing.of(source)
    predictions: list[dict[str, Any]] = []
    with (
        open_source(source, load) as runner,
        console.progress_bar("predicting", len(found.found)) as advance,
    ):
        for part in found.batches(processing.how):
            logits = runner.run(part.pixels)[LOGITS]
            for name, row in zip(part.names, logits, strict=True):
                predictions.append({"image": name, "labels": processing.postprocess(row, top)})
            advance(len(part.names))
    if as_json:
        document = {
            "model": source.model.name,
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
