"""`coat-deploy evaluate`."""

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated

import typer

from coat_deploy.cli import console
from coat_deploy.cli.data_options import DATA, ImageColumnOption, LabelColumnOption
from coat_deploy.cli.quality_report import render_quality
from coat_deploy.cli.sizes import check_sizes
from coat_deploy.errors import ImageError, UsageError
from coat_deploy.spec import format_size, parse_size

if TYPE_CHECKING:
    from coat_deploy.evaluate import Evaluation
    from coat_deploy.model import Model
    from coat_deploy.open import Source
    from coat_deploy.spec import Preprocess, Size

PREPARED = "How images are prepared. Default: as the model serves them"


def evaluate(
    model: console.ModelArgument,
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Labelled images: digits, a folder of class folders, hub:OWNER/NAME[:CONFIG], "
            "parquet:PATH or webdataset:PATH.",
        ),
    ],
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="eager, onnxruntime or openvino. Default: eager where PyTorch and the model's "
            "weights are there, else the artifact's.",
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Precision of the artifact.")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, max=1024, metavar="N", help="Images a step.")] = 16,
    strict: console.StrictOption = False,
    threads: console.ThreadsOption = None,
    device: console.DeviceOption = "cpu",
    provider: console.ProviderOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
    split: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=DATA,
            help="Default: the validation split. Where there is none, all images, those trained on "
            "too; `validation` are then those that a training held out.",
        ),
    ] = None,
    validation_share: Annotated[
        float,
        typer.Option(
            metavar="X", rich_help_panel=DATA, help="Share of the images that a training held out."
        ),
    ] = 0.1,
    split_seed: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=DATA, help="Seed of what it held out.")
    ] = 0,
    limit: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=DATA,
            help="Evaluate at most so many images, evenly spread.",
        ),
    ] = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            metavar="",
            rich_help_panel=DATA,
            help="Fetch the files of this split alone, not those of the others too.",
        ),
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", rich_help_panel=PREPARED, help="SIDE or HEIGHTxWIDTH."),
    ] = None,
    crop_pct: Annotated[
        float | None,
        typer.Option(
            metavar="X",
            rich_help_panel=PREPARED,
            help="Share of the resized image that the crop keeps, 0.1 to 1.",
        ),
    ] = None,
) -> None:
    """Measure how good a model is on labelled images.

    Top-1 and top-5 with 95% intervals, overall and by class, what is taken for what, and how far
    its probabilities can be trusted. Images are prepared as in serving, and the classes of the
    data are found among the model's labels by name. An artifact's proof is replayed first.
    """
    from coat_deploy.data.sources import DataOptions, open_split
    from coat_deploy.evaluate import evaluate as run
    from coat_deploy.open import open_source
    from coat_deploy.repository import Repository, read_labels
    from coat_deploy.runner import LoadOptions

    opened = Repository.open(models).find(model)
    if not opened.spec.num_classes:
        raise UsageError(f"{opened.folder}: has no classifier (num_classes is 0).")
    asked = parse_size(size) if size else None
    if asked:
        check_sizes([asked], opened.spec)
    source = choose_source(opened, target, precision, asked)
    how = prepare(source, asked, crop_pct)
    labels = read_labels(opened.spec)
    options = DataOptions(
        validation_share=validation_share,
        seed=split_seed,
        image_column=image_column,
        label_column=label_column,
        streaming=streaming,
        label_names=labels,
    )
    images = open_split(data, split, options)
    title = f"evaluating {opened.name}"
    load = LoadOptions(threads=threads, batch=batch, device=device, provider=provider)
    with (
        open_source(source, load) as runner,
        console.progress_bar(title, min(limit or len(images), len(images))) as advance,
    ):
        found = run(
            runner, images, labels, how, batch=batch, limit=limit,
            subject=data, progress=advance, tell=console.note,
        )  # fmt: skip
    if as_json:
        document = {
            "model": opened.name,
            "target": source.target,
            "precision": source.precision,
            "artifact": source.artifact.name if source.artifact else None,
            "data": data,
            "split": split,
            "size": list(how.input_size),
            "crop_pct": how.crop_pct,
        }
        console.print_json(document | found.to_json())
    else:
        console.emit(render(source, how, found))
    finish(source, found, strict)


def choose_source(
    model: "Model", target: str | None, precision: str | None, size: "Size | None"
) -> "Source":
    """Return what to evaluate. Raises UsageError, RepositoryError with the export it needs."""
    from coat_deploy.model import ArtifactQuery
    from coat_deploy.open import find_source

    target = target or choose_target(model, precision)
    return find_source(model, ArtifactQuery(target, precision, size))


def choose_target(model: "Model", precision: str | None) -> str:
    """Return eager where it can run in `precision`, else an artifact's target."""
    from coat_deploy.backends.select import PRECISIONS, TARGETS, backend
    from coat_deploy.open import EAGER, default_target

    can = [target for target in TARGETS if precision in (None, *PRECISIONS[target])]
    if EAGER in can and model.weights_path.is_file() and backend(EAGER).missing() is None:
        return EAGER
    target = default_target(model, precision)
    # Where nothing was exported in this precision, the one that could be is told how.
    return target if target in can else next(iter(can), EAGER)


def prepare(source: "Source", size: "Size | None", crop_pct: float | None) -> "Preprocess":
    """Return how images are prepared: as the model serves them, save for what is asked.

    Raises: UsageError for a crop that cannot be.
    """
    how = source.model.spec.preprocess.at(size or source.size)
    if crop_pct is None:
        return how
    if not 0.1 <= crop_pct <= 1:  # nor not-a-number
        raise UsageError(f"--crop-pct: must be between 0.1 and 1 (got {crop_pct:g}).")
    return replace(how, crop_pct=crop_pct)


def render(source: "Source", how: "Preprocess", found: "Evaluation") -> str:
    """Return the report, below it what it was measured with."""
    what = source.artifact.name if source.artifact else f"{source.target}-{source.precision}"
    text = render_quality(f"{source.model.name} {what}", found.quality, found.labels)
    return (
        f"{text}\n{format_size(how.input_size)}, crop {how.crop_pct:g}, "
        f"{found.images_per_second:.4g} images/s with decoding\n"
    )


def finish(source: "Source", found: "Evaluation", strict: bool) -> None:
    """Tell what stands behind the figures. Raises ImageError for broken images with `strict`."""
    record = source.model.weights_record
    if record and record.source.startswith("random"):
        console.note(
            f"{source.model.name}: its weights are {record.source}; the figures mean nothing."
        )
    if found.skipped:
        message = (
            f"{len(found.skipped)} of {found.quality.images + len(found.skipped)} images could "
            "not be read"
        )
        if strict:
            raise ImageError(f"{message}, and --strict is set. Remove or mend them.")
        console.note(f"{message} and were skipped.")
