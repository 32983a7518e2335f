"""`coat-deploy bench`."""

import datetime
import functools
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.errors import RepositoryError, UsageError
from coat_deploy.spec import Size, format_size, parse_size

if TYPE_CHECKING:
    from coat_deploy.measure.bench import BenchReport, Contender
    from coat_deploy.open import Source
    from coat_deploy.repository import Model, Repository

COMPILE = "compile"


@dataclass(frozen=True)
class Entry:
    """One of `--targets`: "openvino:bf16", "onnxruntime:traced", "eager:compile"."""

    text: str
    target: str
    precision: str | None
    form: str | None

    @classmethod
    def parse(cls, text: str) -> "Entry":
        """Read an entry. Raises UsageError for a word that is neither precision nor form."""
        from coat_deploy.backends.select import PRECISIONS, TARGETS
        from coat_deploy.errors import unknown_name
        from coat_deploy.graph.form import FORM_NAMES

        target, *words = text.split(":")
        if target not in TARGETS:
            raise UsageError(unknown_name("target", target, TARGETS))
        forms = (COMPILE,) if target == "eager" else FORM_NAMES
        precision = form = None
        for word in words:
            if word in PRECISIONS[target]:
                precision = word
            elif word in forms:
                form = word
            else:
                known = (*PRECISIONS[target], *forms)
                raise UsageError(unknown_name(f"precision or form of {target}", word, known))
        return cls(text, target, precision, form)


def bench(
    model: console.ModelArgument,
    targets: Annotated[
        str,
        typer.Option(
            help="What to compare: TARGET[:PRECISION][:FORM], separated by commas, as in "
            "eager,eager:compile,onnxruntime,onnxruntime:traced,openvino:bf16."
        ),
    ] = "eager,onnxruntime",
    batch: Annotated[str, typer.Option(help="Batch sizes, separated by commas.")] = "1",
    threads: Annotated[
        str | None, typer.Option(help="Numbers of threads, separated by commas. Default: cores.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Image size. Default: the model's.")] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Entry that ratios divide by. Default: the first.")
    ] = None,
    budget: Annotated[
        float, typer.Option(min=0.1, help="Seconds a group of contenders may take.")
    ] = 20.0,
    stability: Annotated[
        float, typer.Option(min=0.0, help="Stop when every median is known to +- this share.")
    ] = 0.02,
    seed: Annotated[int, typer.Option(help="Of the order within rounds.")] = 0,
    record: Annotated[
        Path | None, typer.Option(help="Append the results to this file, as JSON lines.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the results to this .png or .svg file.")
    ] = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Measure latency, throughput, memory and start, all contenders interleaved in one run.

    Every contender has a process of its own, and only one works at a time. An artifact that is
    not there yet is exported first. Ratios are of medians, above 1 is faster than the baseline.
    """
    from coat_deploy.measure.bench import BenchOptions
    from coat_deploy.measure.bench import bench as run
    from coat_deploy.repository import Repository

    entries = [Entry.parse(text) for text in console.comma_separated(targets, "targets")]
    repository = Repository.open(models)
    opened = repository.find(model)
    wanted = parse_size(size) if size else opened.spec.preprocess.input_size
    opened, sources = prepare(repository, opened, entries, wanted)
    agreements = check(sources)
    contenders = list(
        line_up(
            entries,
            sources,
            wanted,
            console.counts(batch, "batch"),
            list(console.counts(threads, "threads", 1024)) if threads else [None],
        )
    )
    options = BenchOptions(
        budget_s=budget, stability=stability, baseline=baseline or entries[0].text, seed=seed
    )
    with console.steps(f"measuring {model}") as tell:
        pixels = functools.partial(probe_pixels, opened)
        report = run(contenders, pixels, options, lambda what, done: tell(f"{what} {done:.0%}"))
    document = report.to_json() | {"model": opened.name}
    for result in document["results"]:
        result["agreement"] = agreements.get(result["name"])
    if as_json:
        console.print_json(document)
    else:
        show(opened.name, report)
    if record:
        write_record(record, report, opened)
    if plot:
        from coat_deploy.measure.plot import plot as draw

        draw(report.results, plot, machine=report.machine, title=opened.name)


def prepare(
    repository: "Repository", model: "Model", entries: list[Entry], size: Size
) -> tuple["Model", dict[str, "Source"]]:
    """Return the model and what to open for every entry, after exporting what is missing."""
    from coat_deploy.export import ExportOptions, export
    from coat_deploy.open import find_source
    from coat_deploy.repository import ArtifactQuery

    # Eager needs weights in a folder: an export puts them there, so artifacts come first.
    for entry in sorted(entries, key=lambda entry: entry.target == "eager"):
        query = ArtifactQuery(entry.target, entry.precision, size, entry.form)
        if entry.target == "eager":
            continue
        try:
            find_source(model, query)
        except RepositoryError:
            console.note(f"{entry.text}: not exported yet; exporting it")
            fixed = None if size == model.spec.preprocess.input_size else size
            options = ExportOptions(
                entry.target, entry.precision, entry.form or "authored", size=fixed
            )
            model = export(repository, model.name, options).model
    sources = {}
    for entry in entries:
        form = None if entry.target == "eager" else entry.form
        query = ArtifactQuery(entry.target, entry.precision, size, form)
        sources[entry.text] = find_source(model, query)
    return model, sources


def check(sources: dict[str, "Source"]) -> dict[str, dict[str, Any]]:
    """Replay the proof of every artifact before it is measured; return its agreement."""
    from coat_deploy.open import open_source, selftest
    from coat_deploy.runner import LoadOptions

    agreements = {}
    for name, source in sources.items():
        if source.artifact:
            with open_source(source, LoadOptions()) as runner:
                agreement = selftest(source.model, source.artifact, runner)
            agreements[name] = agreement.to_json()
    return agreements


def line_up(
    entries: list[Entry],
    sources: dict[str, "Source"],
    size: Size,
    batches: list[int],
    threads: list[int | None],
) -> Iterator["Contender"]:
    """Yield every entry at every batch size and number of threads."""
    from coat_deploy.measure.bench import Contender
    from coat_deploy.runner import LoadOptions

    for count in threads:
        for batch in batches:
            for entry in entries:
                source = sources[entry.text]
                compiled = entry.form == COMPILE
                yield Contender(
                    name=entry.text,
                    target=entry.target,
                    precision=source.precision,
                    form=COMPILE if compiled else source.form,
                    batch=batch,
                    size=size,
                    threads=count,
                    load=source.loader(LoadOptions(threads=count, compile=compiled)),
                    file=source.path if source.artifact else source.model.weights_path,
                    sha256=source.sha256,
                )


def probe_pixels(model: "Model", batch: int, size: Size) -> Any:
    """Return synthetic images: no kernel's time depends on what is in them."""
    from coat_deploy.images import normalise
    from coat_deploy.measure.proof import probe_images

    how = model.spec.preprocess
    return normalise(probe_images(size, batch), how.mean, how.std)


def show(model: str, report: "BenchReport") -> None:
    """Print the table of results and what failed."""
    for batch, size, threads in dict.fromkeys((r.batch, r.size, r.threads) for r in report.results):
        rows = [
            (
                r.name,
                r.precision,
                r.form,
                r.p50_ms,
                r.p90_ms,
                r.p99_ms,
                r.images_per_second,
                f"{r.ratio:.2f}x" if r.ratio else "-",
                "{:.2f}-{:.2f}".format(*r.ratio_interval) if r.ratio_interval else "-",
                r.peak_memory_mib,
                r.load_ms.cold,
                r.first_run_ms.cold,
                r.stopped,
            )
            for r in report.results
            if (r.batch, r.size, r.threads) == (batch, size, threads)
        ]
        columns = (
            "target", "precision", "form", "p50 ms", "p90 ms", "p99 ms", "images/s", "ratio",
            "95% interval", "peak MiB", "load ms", "first ms", "stopped",
        )  # fmt: skip
        count = f", {threads} threads" if threads else ""
        title = f"{model}, batch {batch}, {format_size(size)}{count}"
        console.print_table(columns, rows, title)
        print()
    for failure in report.failures:
        console.note(f"{failure.name}: failed: {failure.error}")
    print(report.machine.summary())


def write_record(path: Path, report: "BenchReport", model: "Model") -> None:
    """Append the results to a file of records."""
    from coat_deploy.digest import sha256_file
    from coat_deploy.measure.latency import append_records, record_lines

    lines = record_lines(
        report.results,
        report.machine,
        command=shlex.join(["coat-deploy", *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC),
        context={"model": model.name, "weights_sha256": sha256_file(model.weights_path)},
    )
    append_records(path, lines)
