"""`coat-deploy train`. Its options are the fields of a recipe, besides those written out here."""

import contextlib
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.cli.data_options import DATA, ImageColumnOption, LabelColumnOption
from coat_deploy.cli.recipe_options import with_recipe_options
from coat_deploy.cli.training_report import render_training
from coat_deploy.errors import CoatDeployError, UsageError
from coat_deploy.train.recipe import PRESETS, Recipe, read_recipe, resolve_recipe

if TYPE_CHECKING:
    from coat_deploy.data.sources import DataOptions
    from coat_deploy.train.job import Job

RUN = "Running"
DEFAULT_PRESET = "small"


def train(
    variant: Annotated[
        str, typer.Argument(metavar="VARIANT", help="Architecture, for example coat_lite_nano.")
    ],
    data: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Labelled images: a folder of class folders, or one with train and validation; "
            "digits (scikit-learn's); hub:OWNER/NAME, parquet:PATH, webdataset:PATH.",
        ),
    ],
    out: Annotated[str, typer.Option(metavar="NAME", help="Name of the model to write.")],
    preset: Annotated[
        str, typer.Option(metavar="NAME", help=f"Recipe to begin with: {', '.join(PRESETS)}.")
    ] = DEFAULT_PRESET,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Fields of a recipe to set over the preset, as TOML."),
    ] = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
    validation_share: Annotated[
        float,
        typer.Option(
            metavar="X",
            rich_help_panel=DATA,
            help="Share of the images held out, where there is no split to evaluate on.",
        ),
    ] = 0.1,
    split_seed: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=DATA, help="Seed of what is held out.")
    ] = 0,
    train_split: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=DATA, help="Split to train on.")
    ] = None,
    validation_split: Annotated[
        str | None, typer.Option(metavar="NAME", rich_help_panel=DATA, help="Split to evaluate on.")
    ] = None,
    image_column: ImageColumnOption = None,
    label_column: LabelColumnOption = None,
    streaming: Annotated[
        bool,
        typer.Option(
            "--streaming",
            metavar="",
            rich_help_panel=DATA,
            help="Read images on the way instead of fetching all of them first.",
        ),
    ] = False,
    stream_length: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=DATA,
            help="Images in an epoch of a stream that does not tell.",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume",
            metavar="",
            rich_help_panel=RUN,
            help="Go on from the last checkpoint; begin where there is none, and do nothing "
            "where the training was finished.",
        ),
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            metavar="",
            rich_help_panel=RUN,
            help="Replace the model, or the unfinished training, of that name.",
        ),
    ] = False,
    device: Annotated[
        str,
        typer.Option(metavar="NAME", rich_help_panel=RUN, help="auto: a GPU if there is one; cpu."),
    ] = "auto",
    threads: console.ThreadsOption = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            metavar="OWNER/NAME",
            rich_help_panel=RUN,
            help="Upload the finished model to the Hugging Face Hub.",
        ),
    ] = None,
    **fields: Any,
) -> None:
    """Train a CoaT on labelled images and write it as a model, ready to export.

    A recipe is the paper's for ImageNet, changed by the preset, a file and single options, in
    this order. Ctrl-C saves; the same command with --resume goes on. On several GPUs or machines:
    `torchrun --nproc-per-node 8 -m coat_deploy train ...`, or `accelerate launch` with its own
    configuration, for FSDP too.
    """
    from coat_deploy.data.sources import DataOptions

    with _told_once():
        resolved = resolve(preset, data, recipe, fields)
        options = DataOptions(
            validation_share=validation_share,
            seed=split_seed,
            train_split=train_split,
            validation_split=validation_split,
            image_column=image_column,
            label_column=label_column,
            streaming=streaming,
            stream_length=stream_length,
        )
        if push_to_hub:
            from coat_deploy.network.push import check_push

            check_push(push_to_hub)
        job = prepare(
            variant, data, options, out, models, preset, resolved, device, resume=resume,
            overwrite=overwrite,
        )  # fmt: skip
        metrics = run(job, device, threads, resume=resume, overwrite=overwrite)
        if metrics is not None:
            finish(job, metrics, models, push_to_hub, as_json)


def resolve(preset: str, source: str, file: Path | None, fields: Mapping[str, Any]) -> Recipe:
    """Return the recipe of a preset, a file and options, the later over the former.

    Raises: UsageError.
    """
    given = read_recipe(file) if file else {}
    given |= {name: value for name, value in fields.items() if value is not None}
    return resolve_recipe(preset, source, given)


def prepare(
    variant: str,
    source: str,
    options: "DataOptions",
    out: str,
    models: Path | None,
    preset: str,
    recipe: Recipe,
    device: str,
    *,
    resume: bool,
    overwrite: bool,
) -> "Job":
    """Return the training asked for, its data opened; nothing is written yet.

    Its recipe names the precision of this machine's `device` where it was "auto": a training
    resumed elsewhere has to go on in the same.

    Raises: UsageError, before the data is opened where it can.
    """
    from coat_deploy.data.sources import open_splits
    from coat_deploy.network.variants import get_variant
    from coat_deploy.repository import Repository
    from coat_deploy.train.job import Job, check_place
    from coat_deploy.train.processes import settle_precision
    from coat_deploy.train.start import find_base

    get_variant(variant)
    repository = Repository.open(models)
    model = repository.new(out)
    check_place(model, resume=resume, overwrite=overwrite)
    base = find_base(recipe.init, variant, repository)
    settled = settle_precision(recipe, device)
    return Job(variant, settled, open_splits(source, options), model, preset, source, base)


def run(
    job: "Job", device: str, threads: int | None, *, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Run a training under a display of its progress; signals save it first.

    Returns its metrics, None in all processes but the first.
    """
    from coat_deploy.cli.stopping import stopping_on_signals
    from coat_deploy.cli.training_progress import training_progress
    from coat_deploy.train.plan import Stopped
    from coat_deploy.train.processes import open_processes

    if resume and not overwrite and (metrics := job.finished()) is not None:
        if _process() == 0:
            console.note(f"{job.model.name}: was trained to its end before; nothing is left to do.")
        return metrics if _process() == 0 else None
    processes = open_processes(job.recipe, device, threads)
    first = processes.is_main_process
    if not first:  # of what all of them would tell, the first one does
        logging.getLogger("coat_deploy").setLevel(logging.ERROR)
    with stopping_on_signals(told=first) as stop:
        try:
            watchers = [training_progress()] if first else []
            metrics = job.run(processes, watchers, resume=resume, overwrite=overwrite, stop=stop)
        except Stopped as error:
            status = 128 + (stop.received or signal.SIGTERM)
            if first:
                console.fail(str(error), status)
            raise typer.Exit(status) from None
    processes.end_training()
    return metrics if first else None


def finish(
    job: "Job",
    metrics: Mapping[str, Any],
    models: Path | None,
    push_to_hub: str | None,
    as_json: bool,
) -> None:
    """Report, and upload the model if asked to."""
    report = {"model": job.model.name, "folder": str(job.model.folder.resolve()), **metrics}
    if as_json:
        console.print_json(report)
    else:
        console.emit(render_training(report))
    if push_to_hub:
        from coat_deploy.network.push import push_model

        console.note(f"uploaded to {push_model(job.model.folder, push_to_hub)}.")
    console.hint(f"Next: coat-deploy export {job.model.name}{_models_flag(models)}")


def _process() -> int:
    """Return which of several processes this is, before they have met; as launchers tell it."""
    return int(os.environ.get("RANK") or 0)


@contextlib.contextmanager
def _told_once() -> Iterator[None]:
    """Let what goes wrong in all processes alike be told by the first of each machine alone."""
    try:
        yield
    except CoatDeployError as error:
        if int(os.environ.get("LOCAL_RANK") or 0) == 0:
            raise
        from coat_deploy.train.plan import Abandoned, Diverged

        if isinstance(error, UsageError | Diverged | Abandoned):
            raise typer.Exit(error.exit_status) from error
        console.fail(f"process {_process()}: {error}", error.exit_status)


def _models_flag(models: Path | None) -> str:
    return f" --models {models}" if models else ""


with_recipe_options(train)
