"""`coat-deploy validate`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.errors import BelowBar, CorruptArtifact, RepositoryError, UsageError
from coat_deploy.spec import Size, format_size, parse_size

if TYPE_CHECKING:
    from coat_deploy.measure.accuracy import Accuracy
    from coat_deploy.measure.by_block import BlockReport
    from coat_deploy.measure.validate import Validation
    from coat_deploy.open import Source


def validate(
    model: console.ModelArgument,
    images: Annotated[
        list[Path],
        typer.Option(help="Photographs to compare on: files, folders, folders of classes."),
    ],
    target: Annotated[str, typer.Option(help="Target of the artifact.")] = "onnxruntime",
    precision: Annotated[str | None, typer.Option(help="Precision of the artifact.")] = None,
    form: Annotated[str | None, typer.Option(help="authored or traced. Default: authored.")] = None,
    features: Annotated[
        bool, typer.Option("--features", help="The artifact of feature maps.")
    ] = False,
    size: Annotated[
        str | None,
        typer.Option(help="Image sizes, separated by commas. Default: the model's."),
    ] = None,
    batch: Annotated[
        str, typer.Option(help="Batch sizes, taken in turn over the images.")
    ] = "1,2,8",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Compare at most so many images, evenly spread.")
    ] = None,
    by_block: Annotated[
        bool, typer.Option("--by-block", help="Name the first block that departs.")
    ] = False,
    max_abs_difference: Annotated[
        float | None, typer.Option(help="Bar: largest |delta logit|.")
    ] = None,
    max_relative_l2: Annotated[
        float | None, typer.Option(help="Bar: largest relative L2 difference.")
    ] = None,
    min_centred_cosine: Annotated[
        float | None, typer.Option(help="Bar: least mean cosine of the centred logits.")
    ] = None,
    min_top1_agreement: Annotated[
        float | None, typer.Option(help="Bar: least share of equal top-1 classes, 0 to 1.")
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit 1 when an image cannot be read.")
    ] = False,
    threads: console.ThreadsOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Hold an artifact against PyTorch on your images; exit status 3 below the bar.

    Both get the same pixels. With class folders named by the model's labels, the accuracy of
    both is compared too. The report is kept beside the artifact.
    """
    from coat_deploy.cli.inputs import find, match_labels
    from coat_deploy.measure.agreement import get_bar
    from coat_deploy.measure.validate import validate as run
    from coat_deploy.open import find_source, load_unchecked
    from coat_deploy.repository import ArtifactQuery, Repository, read_labels
    from coat_deploy.runner import LoadOptions

    opened = Repository.open(models).find(model)
    sizes = read_sizes(size, opened.spec.preprocess.input_size)
    source = find_source(opened, ArtifactQuery(target, precision, sizes[0], form, features))
    if source.artifact is None:
        raise UsageError("target eager: is the reference itself. Choose another --target.")
    refused = [format_size(s) for s in sizes if not source.artifact.accepts(s)]
    if refused:
        raise UsageError(
            f"{source.artifact.name}: takes {format_size(source.size)} only (got "
            f"{', '.join(refused)} too). Export with --size dynamic, or validate one at a time."
        )
    opened.check_parents(source.artifact)
    try:
        opened.check_files(source.artifact)
        changed = None
    except CorruptArtifact as error:
        # Validation is where one looks when something is wrong: measure what there is.
        changed = str(error)
        console.note(f"warning: {changed}")
    limits = {
        "max_abs_difference": max_abs_difference,
        "max_relative_l2": max_relative_l2,
        "min_centred_cosine": min_centred_cosine,
        "min_top1_agreement": min_top1_agreement,
    }
    bar = get_bar(source.precision).override(**{k: v for k, v in limits.items() if v is not None})
    found = find(images, console.counts(batch, "batch", 1024), limit)
    match_labels(found, read_labels(opened.spec))

    def batches() -> Iterator[Any]:
        for one in sizes:
            yield from found.batches(opened.spec.preprocess.at(one))

    load = LoadOptions(threads=threads, features=features)
    title = f"validating {source.artifact.name}"
    with (
        load_unchecked("eager", opened.folder, load) as reference,
        source.loader(load)() as candidate,
        console.progress_bar(title, len(found.found) * len(sizes)) as advance,
    ):
        validation = run(reference, candidate, batches(), bar, advance)
    blocks = (
        compare_by_block(source, found.first(opened.spec.preprocess.at(sizes[0])), threads)
        if by_block
        else None
    )
    report = {
        "model": opened.name,
        "artifact": source.artifact.name,
        "sha256": source.artifact.sha256,
        "target": source.target,
        "precision": source.precision,
        "file_as_exported": changed is None,
        "skipped": {str(path): why for path, why in found.broken.items()},
        **validation.to_json(),
    }
    if changed:
        report["passed"] = False
        report["failures"] = [changed, *report["failures"]]
    if blocks:
        report["by_block"] = blocks.to_json()
    table = render(opened.name, source, validation, blocks)
    keep(source, report, table)
    if as_json:
        console.print_json(report)
    else:
        print(table, end="")
    if not report["passed"]:
        raise BelowBar(f"{source.artifact.name}: {' '.join(report['failures'])}")
    found.finish(strict)


def read_sizes(text: str | None, default: Size) -> list[Size]:
    """Return the sizes of "224,224x320"; the default where none is given."""
    if text is None:
        return [default]
    return [parse_size(part) for part in console.comma_separated(text, "size")]


def compare_by_block(source: "Source", pixels: Any, threads: int | None) -> "BlockReport":
    """Return how far every block of an artifact is from the network's, on a few images."""
    from coat_deploy.graph.taps import block_taps
    from coat_deploy.measure.by_block import BLOCK_LIMITS, compare_blocks
    from coat_deploy.open import load_unchecked
    from coat_deploy.runner import LoadOptions

    assert source.artifact is not None
    taps = block_taps(source.path)
    load = LoadOptions(threads=threads, features=source.artifact.features, taps=taps)
    with (
        load_unchecked("eager", source.model.folder, load) as reference,
        source.loader(load)() as candidate,
    ):
        limit = BLOCK_LIMITS[source.precision]
        return compare_blocks(reference, candidate, taps, pixels, limit)


def render(
    model: str, source: "Source", validation: "Validation", blocks: "BlockReport | None"
) -> str:
    """Return the report as text."""
    assert source.artifact is not None
    agreement = validation.agreement
    rows: list[tuple[str, object]] = [
        ("images", validation.images),
        ("max |delta|", agreement.max_abs_difference),
        ("mean |delta|", agreement.mean_abs_difference),
        ("relative L2", agreement.relative_l2),
        ("centred cosine", agreement.centred_cosine),
        ("KL divergence", agreement.kl_divergence),
        ("top-1 agreement", agreement.top1_agreement),
        ("top-5 overlap", agreement.top5_overlap),
        ("NaN or Inf, eager", agreement.non_finite_reference),
        ("NaN or Inf, artifact", agreement.non_finite_candidate),
    ]
    title = f"{model}: {source.artifact.name} against eager"
    text = console.render_table(("", source.target), rows, title)
    groups = [(f"batch {n}", a) for n, a in sorted(validation.by_batch.items())]
    groups += [(format_size(s), a) for s, a in validation.by_size.items()]
    columns = ("", "images", "max |delta|", "relative L2", "top-1 agreement")
    text += "\n" + console.render_table(
        columns,
        [
            (name, a.images, a.max_abs_difference, a.relative_l2, a.top1_agreement)
            for name, a in groups
        ],
    )
    if validation.accuracy:
        text += "\n" + render_accuracy(validation.accuracy)
    if blocks:
        departed = blocks.departure
        text += "\n" + console.render_table(
            ("block", "max |delta|", "relative L2"),
            [(b.block, b.max_abs_difference, b.relative_l2) for b in blocks.blocks],
        )
        text += f"\n{departed.reason if departed else 'No block departs.'}\n"
    return text


def render_accuracy(accuracy: "Accuracy") -> str:
    """Return the accuracies with their intervals as text."""
    rows = [
        (f"{top} of {runner}", share.value, f"{share.low:.4f} to {share.high:.4f}")
        for top, paired in (("top-1", accuracy.top1), ("top-5", accuracy.top5))
        for runner, share in (("eager", paired.reference), ("artifact", paired.candidate))
    ]
    text = console.render_table(("accuracy", "share", "95% interval"), rows)
    verdict = "noise" if accuracy.top1.is_noise else "no noise"
    return (
        f"{text}\nThe difference in top-1 is {verdict} (McNemar p {accuracy.top1.p_value:.3f}).\n"
    )


def keep(source: "Source", report: dict[str, Any], table: str) -> None:
    """Keep the report beside the artifact; a repository that is only read is no failure."""
    assert source.artifact is not None
    try:
        source.model.write_report(
            source.artifact, "validation.json", json.dumps(report, indent=2) + "\n"
        )
        source.model.write_report(source.artifact, "validation.txt", table)
    except RepositoryError as error:
        console.note(f"the report is not kept: {error}")
