"""`coat-deploy validate`."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.cli.sizes import read_sizes
from coat_deploy.errors import (
    BelowBar,
    CorruptArtifact,
    RepositoryError,
    UsageError,
    unknown_name,
)
from coat_deploy.spec import Size, format_size

if TYPE_CHECKING:
    from coat_deploy.artifact import Artifact
    from coat_deploy.cli.inputs import Images
    from coat_deploy.measure.by_block import BlockReport
    from coat_deploy.model import ArtifactQuery, Model
    from coat_deploy.open import Source
    from coat_deploy.runner import LoadOptions

ARTIFACT, BAR = "Which artifact", "The bar: what must hold. Default: by precision"


def validate(
    model: console.ModelArgument,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="PATH",
            help="Photographs: a file, a folder, a folder of class folders; may be repeated.",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Labelled images instead, as `evaluate` takes them: those it measures with.",
        ),
    ] = None,
    batch: Annotated[
        str,
        typer.Option(metavar="N,N", help="Batch sizes, taken in turn over the images."),
    ] = "1,2,8",
    size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE,SIZE", help="Image sizes, SIDE or HEIGHTxWIDTH. Default: the model's own."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Compare at most so many images, evenly spread."),
    ] = None,
    by_block: Annotated[
        bool,
        typer.Option(
            "--by-block", metavar="", help="Name the first block of the network that departs."
        ),
    ] = False,
    strict: console.StrictOption = False,
    threads: console.ThreadsOption = None,
    device: console.DeviceOption = "cpu",
    provider: console.ProviderOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
    target: Annotated[
        str, typer.Option(metavar="NAME", rich_help_panel=ARTIFACT, help="onnxruntime or openvino.")
    ] = "onnxruntime",
    precision: Annotated[
        str | None,
        typer.Option(metavar="NAME", rich_help_panel=ARTIFACT, help="fp32 or bf16. Default: any."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", rich_help_panel=ARTIFACT, help="authored or traced. Default: authored."
        ),
    ] = None,
    features: Annotated[
        bool,
        typer.Option(
            "--features", metavar="", rich_help_panel=ARTIFACT, help="The one of feature maps."
        ),
    ] = False,
    max_abs_difference: Annotated[
        float | None,
        typer.Option(metavar="X", rich_help_panel=BAR, help="Largest |delta logit|."),
    ] = None,
    max_relative_l2: Annotated[
        float | None,
        typer.Option(metavar="X", rich_help_panel=BAR, help="Largest relative L2 difference."),
    ] = None,
    min_centred_cosine: Annotated[
        float | None,
        typer.Option(
            metavar="X", rich_help_panel=BAR, help="Least mean cosine of the centred logits."
        ),
    ] = None,
    min_top1_agreement: Annotated[
        float | None,
        typer.Option(
            metavar="X", rich_help_panel=BAR, help="Least share of equal top-1 classes, 0 to 1."
        ),
    ] = None,
) -> None:
    """Compare an artifact with PyTorch on your images.

    Both get the same pixels, in several batch sizes. Exit status 3 when they do not agree. With
    --data, or class folders named by the model's labels, the accuracy of both is compared too.
    The report is kept beside the artifact, as JSON and as text.
    """
    from coat_deploy.cli.inputs import match_labels
    from coat_deploy.cli.validation_report import render
    from coat_deploy.graph.taps import block_taps
    from coat_deploy.measure.bar import get_bar
    from coat_deploy.measure.validate import validate as run
    from coat_deploy.model import ArtifactQuery
    from coat_deploy.open import load_unchecked
    from coat_deploy.repository import Repository, read_labels
    from coat_deploy.runner import LoadOptions

    if bool(images) == bool(data):
        raise UsageError(
            "images: give either --images or --data (got both or neither). "
            "Try: coat-deploy validate --help"
        )
    opened = Repository.open(models).find(model)
    sizes = read_sizes(size, opened.spec)
    found = find_images(images, data, console.counts(batch, "batch", 1024), limit)
    query = ArtifactQuery(target, precision, sizes[0] if size else None, form, features)
    source, artifact = find_artifact(opened, query, sizes if size else ())
    sizes = sizes if size else [source.size]
    limits = {
        "max_abs_difference": max_abs_difference,
        "max_relative_l2": max_relative_l2,
        "min_centred_cosine": min_centred_cosine,
        "min_top1_agreement": min_top1_agreement,
    }
    bar = get_bar(source.precision).override(**{k: v for k, v in limits.items() if v is not None})
    if by_block and artifact.package:
        raise UsageError(
            f"--by-block: {artifact.name} has no inner tensors to return. Leave it out."
        )
    changed = examine(source, artifact, device)
    taps = block_taps(source.path) if by_block else ()
    unlabelled = match_labels(found, read_labels(opened.spec)) if not features else ""
    if unlabelled:
        console.note(f"accuracy is not compared: {unlabelled}.")

    def batches() -> Iterator[Any]:
        for one in sizes:
            yield from found.batches(opened.spec.preprocess.at(one))

    load = LoadOptions(threads=threads, features=features)
    there = replace(load, device=device, provider=provider)
    title = f"validating {artifact.name}"
    with (
        load_unchecked("eager", opened.folder, load) as reference,
        source.loader(there)() as candidate,
        console.progress_bar(title, len(found.found) * len(sizes)) as advance,
    ):
        validation = run(reference, candidate, batches(), bar, advance)
    untried = [n for n in found.batch_sizes if n not in validation.by_batch]
    if untried:
        console.note(f"too few images for batches of {', '.join(map(str, untried))}.")
    blocks = compare_by_block(source, taps, found, sizes[0], load) if by_block else None
    report = {
        "model": opened.name,
        "artifact": artifact.name,
        "sha256": artifact.sha256,
        "target": source.target,
        "precision": source.precision,
        "file_as_exported": changed is None,
        "skipped": found.skipped(),
        **validation.to_json(),
        "by_block": blocks.to_json() if blocks else None,
    }
    if changed:
        report |= {"passed": False, "failures": [changed, *report["failures"]]}
    text = render(f"{opened.name} {artifact.name}", validation, report["failures"], blocks)
    report["report"] = keep(source, artifact, report, text)
    if as_json:
        console.print_json(report)
    else:
        verdict, rest = text.split(":", 1)
        colour = "green" if report["passed"] else "red"
        console.emit(f"{console.styled(verdict, colour)}:{rest}")
    if not report["passed"]:
        # What changed in the file was told before, with the command that mends it.
        reasons = " ".join(validation.failures) or "its file changed, though it still agrees."
        advice = "" if by_block else " Where it departs: add --by-block."
        raise BelowBar(f"{artifact.name}: {reasons}{advice}")
    found.finish(strict)


def find_images(
    paths: Sequence[Path] | None, source: str | None, batch_sizes: Sequence[int], limit: int | None
) -> "Images":
    """Return the images of `--images`, or of `--data` where that is given. Raises UsageError."""
    from coat_deploy.cli.inputs import find, of_dataset
    from coat_deploy.data.sources import open_split

    if source:
        return of_dataset(open_split(source, None), batch_sizes, limit)
    return find(paths or (), batch_sizes, limit)


def find_artifact(
    model: "Model", query: "ArtifactQuery", sizes: Sequence[Size]
) -> "tuple[Source, Artifact]":
    """Return the artifact meant, that takes all `sizes`. Raises UsageError, RepositoryError."""
    from coat_deploy.backends.select import PRECISIONS, TARGETS
    from coat_deploy.graph.form import FORM_NAMES
    from coat_deploy.open import EAGER, Source, find_source

    for what, name, known in (
        ("target", query.target, TARGETS),
        (f"precision for {query.target}", query.precision, PRECISIONS.get(query.target, ())),
        ("form", query.form, FORM_NAMES),
    ):
        if name is not None and name not in known:
            raise UsageError(unknown_name(what, name, known))
    if query.target == EAGER:
        raise UsageError("target eager: is the reference itself. Choose another --target.")
    fit = [a for a in model.artifacts if query.matches(a) and all(map(a.accepts, sizes))]
    if len(sizes) > 1 and fit:  # of one size, the nearest is preferred to one that takes any
        artifact = min(fit, key=lambda artifact: artifact.form != "authored")
        return Source(model, query.target, artifact), artifact
    source = find_source(model, query)
    assert source.artifact is not None
    refused = [format_size(size) for size in sizes if not source.artifact.accepts(size)]
    if refused:
        raise UsageError(
            f"{source.artifact.name}: takes {format_size(source.size)} only (got "
            f"{', '.join(refused)} too). Export with --size dynamic, or validate one at a time."
        )
    return source, source.artifact


def examine(source: "Source", artifact: "Artifact", device: str) -> str | None:
    """Return what changed in the artifact's files since its export, None if nothing did.

    Raises: StaleArtifact, for then PyTorch's side is another network, or this is a machine that the
    artifact is not for; CorruptArtifact for a package that changed: it is machine code.
    """
    from coat_deploy.open import check_machine

    source.model.check_parents(artifact)
    if artifact.package:
        source.model.check_files(artifact)
    check_machine(source.model, artifact, device)
    try:
        source.model.check_files(artifact)
    except CorruptArtifact as error:
        # Validation is where one looks when something is wrong: measure what there is.
        console.note(f"warning: {error}")
        return str(error)
    return None


def compare_by_block(
    source: "Source", taps: tuple[str, ...], found: "Images", size: Size, load: "LoadOptions"
) -> "BlockReport":
    """Return how far every block of an artifact is from the network's, on a few images."""
    from coat_deploy.measure.by_block import BLOCK_LIMITS, compare_blocks
    from coat_deploy.open import load_unchecked

    load = replace(load, taps=taps)
    pixels = found.first(source.model.spec.preprocess.at(size))
    with (
        load_unchecked("eager", source.model.folder, load) as reference,
        source.loader(load)() as candidate,
    ):
        limit = BLOCK_LIMITS[source.precision]
        return compare_blocks(reference, candidate, taps, pixels, limit)


def keep(source: "Source", artifact: "Artifact", report: dict[str, Any], text: str) -> str | None:
    """Keep the report beside the artifact and return its path; None where one can only read."""
    try:
        source.model.write_report(artifact, "validation.txt", text)
        content = json.dumps(report, indent=2, allow_nan=False) + "\n"
        return str(source.model.write_report(artifact, "validation.json", content).resolve())
    except RepositoryError as error:
        console.note(f"the report is not kept: {error}")
        return None
