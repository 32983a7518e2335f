"""`coat-deploy bench`."""

import datetime
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.cli.sizes import check_sizes
from coat_deploy.cli.tables import render_table
from coat_deploy.errors import CoatDeployError, RunnerError, UsageError, unknown_name
from coat_deploy.spec import Size, format_size, parse_size

if TYPE_CHECKING:
    from coat_deploy.measure.bench import BenchReport
    from coat_deploy.measure.latency import Failure, Latency
    from coat_deploy.measure.throughput import ThroughputReport
    from coat_deploy.model import Model

HOW_LONG, KEEP = "How long", "What to keep"


def bench(
    model: console.ModelArgument,
    targets: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="What to compare, separated by commas, each TARGET, TARGET:PRECISION, TARGET:FORM "
            "or both: eager, eager:compile, onnxruntime, onnxruntime:traced, openvino:bf16.",
        ),
    ] = "eager,onnxruntime",
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help="Batch sizes, separated by commas. Default: 1, or 1 to 32 for --throughput.",
        ),
    ] = None,
    threads: Annotated[
        str | None,
        typer.Option(
            metavar="N,N", help="Numbers of threads, separated by commas. Default: one a core."
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="SIDE or HEIGHTxWIDTH. Default: the model's own."),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The one that ratios divide by. Default: the first."),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Weights for a model whose folder has none yet, as for export: timm, official, "
            "a file, random. Speed does not depend on them.",
        ),
    ] = None,
    throughput: Annotated[
        bool,
        typer.Option(
            "--throughput",
            metavar="",
            help="Find each target's most images a second instead: how many requests at once "
            "share the threads, and in what batches.",
        ),
    ] = False,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
    budget: Annotated[
        float,
        typer.Option(
            min=0.1,
            metavar="S",
            rich_help_panel=HOW_LONG,
            help="Seconds of measuring for all contenders of a batch size and thread count.",
        ),
    ] = 20.0,
    stability: Annotated[
        float,
        typer.Option(
            min=0.0,
            metavar="X",
            rich_help_panel=HOW_LONG,
            help="Stop earlier, when every median is known to within this share of it.",
        ),
    ] = 0.02,
    seed: Annotated[
        int,
        typer.Option(min=0, metavar="N", rich_help_panel=HOW_LONG, help="Of the order in rounds."),
    ] = 0,
    record: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=KEEP, help="Append the results, as JSON lines."
        ),
    ] = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=KEEP, help="Draw them to a .png or .svg."),
    ] = None,
) -> None:
    """Measure speed, start and memory of targets side by side.

    Contenders take turns in one run, so that what slows the machine slows all of them; each has
    a process of its own, and only one works at a time. An artifact that is not there yet is
    exported first, and every proof is replayed. Ratios are of medians: above 1 is faster than the
    baseline. Exit status 1 when a contender could not be measured.
    """
    from coat_deploy.cli import throughput as search
    from coat_deploy.cli.contenders import line_up, read_entries
    from coat_deploy.measure.bench import BenchOptions, BenchReport
    from coat_deploy.measure.bench import bench as run
    from coat_deploy.repository import Repository

    entries = read_entries(targets)
    names = [entry.text for entry in entries]
    if baseline is not None and baseline not in names:
        raise UsageError(unknown_name("baseline", baseline, names))
    batches = console.counts(batch or "1", "batch")
    counts = console.counts(threads, "threads", 1024) if threads else [None]
    check_files(record, plot)
    shared = search.one_number_of_threads(counts, plot) if throughput else None
    counts = [shared] if shared else counts
    repository = Repository.open(models)
    opened = repository.find(model)
    wanted = parse_size(size) if size else opened.spec.preprocess.input_size
    check_sizes([wanted], opened.spec)
    with console.steps(f"measuring {model}") as tell:
        tell("replaying proofs")
        lineup = line_up(repository, opened, entries, wanted, weights)
        if not lineup.sources:
            raise RunnerError("; ".join(f"{n}: {why}" for n, why in lineup.failed.items()))
        against = baseline or names[0]
        options = BenchOptions(
            budget_s=budget,
            stability=stability,
            baseline=against if against in lineup.sources else None,
            seed=seed,
        )
        opened = lineup.model
        pixels = functools.partial(probe_pixels, opened)

        def progress(what: str, done: float) -> None:
            tell(f"{what} {done:.0%}")

        report: BenchReport | ThroughputReport
        if shared:
            few = batches if batch else None
            report = search.run(lineup, entries, shared, few, pixels, options, progress)
        else:
            contenders = list(lineup.contenders(entries, batches, counts))
            report = run(contenders, pixels, options, progress)
    failures = [*lineup.failures(entries, batches, counts), *report.failures]
    document = report.to_json() | {"model": opened.name}
    document["failures"] = [failure.to_json() for failure in failures]
    for result in document["results"]:
        result["agreement"] = lineup.agreements.get(result["name"])
    if as_json:
        console.print_json(document)
    elif isinstance(report, BenchReport):
        console.emit(render(opened.name, report))
    else:
        console.emit(search.render(opened.name, report))
    if record:
        write_record(record, report, opened)
    if plot and isinstance(report, BenchReport):
        from coat_deploy.measure.plot import plot as draw

        draw(report.results, plot, machine=report.machine, title=opened.name)
    tell_failures(failures)


def check_files(record: Path | None, plot: Path | None) -> None:
    """Raise before anything is measured where the results could not be kept."""
    for path in filter(None, (record, plot)):
        if not path.absolute().parent.is_dir():
            raise UsageError(f"{path}: its folder does not exist. Make it first.")
        if path.is_dir():
            raise UsageError(f"{path}: is a folder. Name a file in it.")
    if plot:
        import importlib.util

        from coat_deploy.errors import BackendMissing
        from coat_deploy.measure.plot import SUFFIXES

        if plot.suffix.lower() not in SUFFIXES:
            raise UsageError(
                f"{plot}: not a kind of picture we draw (got '{plot.suffix}', expected "
                f"{' or '.join(SUFFIXES)}). Name it for example latency.svg."
            )
        if importlib.util.find_spec("matplotlib") is None:
            raise BackendMissing(
                '--plot: matplotlib is not installed. Run: pip install "coat-deploy[plot]"'
            )


def probe_pixels(model: "Model", batch: int, size: Size) -> Any:
    """Return synthetic images: no kernel's time depends on what is in them."""
    from coat_deploy.images import normalise
    from coat_deploy.measure.proof import probe_images

    how = model.spec.preprocess
    return normalise(probe_images(size, batch), how.mean, how.std)


def render(model: str, report: "BenchReport") -> str:
    """Return a table of speed a group of contenders, and one of start and memory."""
    groups: dict[tuple[int, Size, int | None], list[Latency]] = {}
    for result in report.results:
        groups.setdefault((result.batch, result.size, result.threads), []).append(result)
    parts = [_speed(model, results) for results in groups.values()]
    parts.append(_start_and_memory(report.results))
    parts.append(f"{report.machine.summary()}\n")
    return "\n".join(parts)


def _speed(model: str, results: "Sequence[Latency]") -> str:
    first = results[0]
    threads = f", {first.threads} thread{'s'[: first.threads != 1]}" if first.threads else ""
    ended = {
        "stable": f"stable after {first.rounds} rounds",
        "budget": f"ended by --budget after {first.rounds} rounds",
    }
    title = f"{model}, batch {first.batch}, {format_size(first.size)}{threads}"
    rows = [
        (
            *(r.name, r.p50_ms, r.p90_ms, r.p99_ms, r.images_per_second),
            f"{r.ratio:.2f}x" if r.ratio else "-",
            "baseline" if r.name == r.baseline else _interval(r.ratio_interval),
        )
        for r in results
    ]
    columns = ("", "p50 ms", "p90 ms", "p99 ms", "images/s", "ratio", "95% interval")
    return render_table(columns, rows, f"{title}: {ended[first.stopped]}")


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"


def _start_and_memory(results: "Sequence[Latency]") -> str:
    batches = len({result.batch for result in results}) > 1
    threads = len({result.threads for result in results}) > 1
    rows = [
        (
            *(r.name, *([r.batch] if batches else []), *([r.threads] if threads else [])),
            *(f"{r.precision} {r.form}", r.peak_memory_mib and round(r.peak_memory_mib)),
            *(f"{r.load_ms.cold:.0f} / {r.load_ms.warm:.0f}",),
            f"{r.first_run_ms.cold:.0f} / {r.first_run_ms.warm:.0f}",
        )
        for r in results
    ]
    columns = ("", *(["batch"] if batches else []), *(["threads"] if threads else []), "what")
    columns += ("peak MiB", "load ms", "first run ms")
    return render_table(columns, rows, "Memory, and start: cold / warm")


def write_record(path: Path, report: "BenchReport | ThroughputReport", model: "Model") -> None:
    """Append the results to a file of records."""
    from coat_deploy.digest import sha256_file
    from coat_deploy.measure.latency import append_records, record_lines

    lines = record_lines(
        report.results,
        report.machine,
        command=shlex.join([console.NAME, *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC),
        context={"model": model.name, "weights_sha256": sha256_file(model.weights_path)},
    )
    append_records(path, lines)


def tell_failures(failures: "Sequence[Failure]") -> None:
    """Tell what could not be measured. Raises CoatDeployError when anything was not."""
    if not failures:
        return
    reasons: dict[tuple[str, str], list[str]] = {}
    for failure in failures:
        reasons.setdefault((failure.name, failure.error), []).append(str(failure.batch))
    for (name, error), batches in reasons.items():
        console.note(f"{name}, batch {','.join(dict.fromkeys(batches))}: {error}")
    names = ", ".join(dict.fromkeys(failure.name for failure in failures))
    raise CoatDeployError(f"bench: could not be measured: {names}. The others are above.")
