"""`coat-deploy bench`."""

import dataclasses
import datetime
import functools
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.cli.bench_report import render
from coat_deploy.cli.sizes import check_sizes
from coat_deploy.errors import CoatDeployError, RunnerError, UsageError, unknown_name
from coat_deploy.spec import Size, parse_size

if TYPE_CHECKING:
    from coat_deploy.cli.contenders import LineUp
    from coat_deploy.measure.bench import BenchReport
    from coat_deploy.measure.latency import Failure
    from coat_deploy.measure.limits import Limits
    from coat_deploy.measure.throughput import ThroughputReport
    from coat_deploy.model import Model

HOW_LONG, KEEP = "How long", "What to keep"
TARGETS, BATCHES = "eager,onnxruntime", "1"


def bench(
    model: console.ModelArgument,
    targets: Annotated[
        str | None,
        typer.Option(
            metavar="LIST",
            help="What to compare, separated by commas, each TARGET, TARGET:PRECISION, TARGET:FORM "
            "or both: eager, eager:compile, onnxruntime, onnxruntime:traced, openvino:bf16; on a "
            "GPU eager:fp16, eager:fused, eager:bf16:fused+compile. "
            f"Default: {TARGETS}.",
        ),
    ] = None,
    peers: Annotated[
        bool,
        typer.Option(
            "--peers",
            metavar="",
            help="Compare every way to run the model here: PyTorch, torch.compile, PyTorch's own "
            "export on each runtime and precision, and ours; with --limits. What this machine "
            "lacks is left out.",
        ),
    ] = False,
    limits: Annotated[
        bool,
        typer.Option(
            "--limits",
            metavar="",
            help="Measure matrix products and memory too, and tell each one's share of the "
            "least time possible.",
        ),
    ] = False,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="N,N",
            help=f"Batch sizes, separated by commas. Default: {BATCHES}; with --peers 1,8; with "
            "--throughput 1 to 32, on a GPU to 256.",
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
        typer.Option(
            metavar="NAME",
            help="The one that ratios divide by. Default: the first; with --peers "
            "onnxruntime:traced.",
        ),
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
    device: console.DeviceOption = "cpu",
    provider: console.ProviderOption = None,
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
    baseline; an authored graph is also held against the traced one of its runtime and precision,
    if that takes part. Exit status 1 when a contender could not be measured.
    """
    from coat_deploy.cli import peers as every_peer
    from coat_deploy.cli import throughput as search
    from coat_deploy.cli.contenders import line_up, read_entries
    from coat_deploy.cli.roofline import limits_if_possible, measure_limits
    from coat_deploy.measure.bench import BenchOptions, BenchReport
    from coat_deploy.measure.bench import bench as run
    from coat_deploy.repository import Repository
    from coat_deploy.runner import LoadOptions

    LoadOptions(device=device, provider=provider)  # raises for what cannot be
    if limits and device != "cpu":
        raise UsageError("--limits: measures the processor. Leave it out, or --device.")
    if peers and targets is not None:
        raise UsageError("--peers: names the targets itself. Leave --targets out, or --peers.")
    named = TARGETS if targets is None else targets
    entries = every_peer.peer_entries() if peers else read_entries(named)
    names = [entry.text for entry in entries]
    if baseline is not None and baseline not in names:
        raise UsageError(unknown_name("baseline", baseline, names))
    default = every_peer.BATCHES if peers else BATCHES
    batches = console.counts(batch or default, "batch")
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
        lineup = line_up(
            repository, opened, entries, wanted, weights,
            optional=peers, device=device, provider=provider,
        )  # fmt: skip
        if not lineup.sources:
            reasons = lineup.failed | lineup.left_out
            raise RunnerError("; ".join(f"{name}: {why}" for name, why in reasons.items()))
        against = baseline or (every_peer.BASELINE if peers else names[0])
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
        least = None
        if shared:
            few = batches if batch else None
            report = search.run(lineup, entries, shared, few, pixels, options, progress)
        else:
            contenders = list(lineup.contenders(entries, batches, counts))
            if limits or (peers and device == "cpu"):
                measure = measure_limits if limits else limits_if_possible
                least = measure(opened.spec, wanted, contenders, tell)
            report = run(contenders, pixels, options, progress)
            if least is not None:
                report = dataclasses.replace(report, results=least.apply(report.results))
    failures = [*lineup.failures(entries, batches, counts), *report.failures]
    if as_json:
        console.print_json(describe(report, lineup, least, failures))
    elif isinstance(report, BenchReport):
        console.emit(render(opened.name, report, lineup.agreements, least))
    else:
        console.emit(search.render(opened.name, report))
    if record:
        write_record(record, report, opened, least)
    if plot and isinstance(report, BenchReport):
        from coat_deploy.measure.plot import plot as draw

        draw(report.results, plot, machine=report.machine, title=opened.name)
    every_peer.tell_left_out(lineup.left_out)
    tell_failures(failures)


def describe(
    report: "BenchReport | ThroughputReport",
    lineup: "LineUp",
    limits: "Limits | None",
    failures: "Sequence[Failure]",
) -> dict[str, Any]:
    """Return what `--json` prints."""
    document = report.to_json() | {
        "model": lineup.model.name,
        "limits": limits and limits.to_json(),
        "left_out": [{"name": n, "reason": why} for n, why in lineup.left_out.items()],
        "failures": [failure.to_json() for failure in failures],
    }
    for result in document["results"]:
        result["agreement"] = lineup.agreements.get(result["name"])
    return document


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


def write_record(
    path: Path,
    report: "BenchReport | ThroughputReport",
    model: "Model",
    limits: "Limits | None",
) -> None:
    """Append the results to a file of records."""
    from coat_deploy.digest import sha256_file
    from coat_deploy.measure.latency import append_records, record_lines

    lines = record_lines(
        report.results,
        report.machine,
        command=shlex.join([console.NAME, *sys.argv[1:]]),
        date=datetime.datetime.now(datetime.UTC),
        context={
            "model": model.name,
            "weights_sha256": sha256_file(model.weights_path),
            "limits": limits and limits.to_json(),
        },
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
