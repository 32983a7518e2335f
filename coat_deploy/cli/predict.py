"""`coat-deploy predict`."""

from pathlib import Path
from typing import Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.errors import UsageError


def predict(
    model: console.ModelArgument,
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Images, or folders of images.")
    ],
    target: Annotated[
        str | None,
        typer.Option(help="Runtime. Default: that of the first artifact, else eager."),
    ] = None,
    precision: Annotated[str | None, typer.Option(help="Precision of the artifact.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many labels an image.")] = 5,
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Images a step.")] = 8,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 when an image cannot be read.")
    ] = False,
    threads: console.ThreadsOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Classify images: the likeliest labels with their probabilities.

    Uses the same preprocessing as validation, and replays the artifact's proof first.
    """
    from coat_deploy.cli.inputs import find
    from coat_deploy.labels import top_labels
    from coat_deploy.open import find_source, open_source
    from coat_deploy.repository import ArtifactQuery, Repository, read_labels
    from coat_deploy.runner import LOGITS, LoadOptions

    opened = Repository.open(models).find(model)
    if target is None:
        usable = [a for a in opened.artifacts if not a.features]
        target = usable[0].target if usable else "eager"
    source = find_source(opened, ArtifactQuery(target, precision))
    if not opened.spec.num_classes:
        raise UsageError(f"{opened.folder}: has no classifier (num_classes is 0).")
    labels = read_labels(opened.spec)
    found = find(images, (batch,))
    predictions: list[dict[str, Any]] = []
    with (
        open_source(source, LoadOptions(threads=threads)) as runner,
        console.progress_bar("predicting", len(found.found)) as advance,
    ):
        for part in found.batches(opened.spec.preprocess.at(source.size)):
            logits = runner.run(part.pixels)[LOGITS]
            for name, row in zip(part.names, logits, strict=True):
                predictions.append({"image": name, "labels": top_labels(row, labels, top)})
            advance(len(part.names))
    if as_json:
        console.print_json(
            {
                "model": opened.name,
                "target": source.target,
                "precision": source.precision,
                "predictions": predictions,
                "skipped": {str(path): why for path, why in found.broken.items()},
            }
        )
    else:
        rows = [
            (prediction["image"] if i == 0 else "", label["label"], label["score"])
            for prediction in predictions
            for i, label in enumerate(prediction["labels"])
        ]
        console.print_table(("image", "label", "probability"), rows)
    found.finish(strict)
