"""`coat-deploy bench --throughput`: the search for the most images a second, and its tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from coat_deploy.cli.contenders import Entry, LineUp
from coat_deploy.cli.tables import format_cell, render_table
from coat_deploy.errors import UsageError
from coat_deploy.spec import format_size

if TYPE_CHECKING:
    from coat_deploy.measure.bench import BenchOptions, MakePixels, Progress
    from coat_deploy.measure.search import Tried
    from coat_deploy.measure.throughput import Throughput, ThroughputReport

ENDED = {"stable": "stable after {} rounds", "budget": "ended by --budget after {} rounds"}

TRIALS_A_BUDGET = 20
"""How many configurations are searched in the time that the finalists then have: 1 s each."""


def one_number_of_threads(counts: Sequence[int | None], plot: Path | None) -> int:
    """Return how many threads the streams share: the one asked for, or one a hardware thread.

    Raises: UsageError for several, and for options that mean nothing here.
    """
    from coat_deploy.machine import usable_threads

    if plot is not None:
        raise UsageError("--plot: draws latencies, not throughput. Leave it out, or --throughput.")
    if len(counts) > 1:
        raise UsageError(
            f"--threads: one number with --throughput (got {','.join(map(str, counts))}). "
            "Run it once for each."
        )
    return counts[0] or usable_threads()


def run(
    lineup: LineUp,
    entries: Sequence[Entry],
    threads: int,
    batches: Sequence[int] | None,
    pixels: "MakePixels",
    options: "BenchOptions",
    progress: "Progress",
) -> "ThroughputReport":
    """Search the best streams and batch of every entry that can start.

    `batches` None are those that the search tries by itself. Raises: RunnerError when all fail.
    """
    from coat_deploy.measure.search import (
        BATCHES,
        GPU_BATCHES,
        ThroughputOptions,
        stream_counts,
    )
    from coat_deploy.measure.throughput import throughput

    on_gpu = lineup.device == "cuda"  # which a large batch fills, and streams would share
    contenders = [
        contender
        for entry in entries
        for streams in ([1] if on_gpu else stream_counts(threads))
        for contender in lineup.contenders([entry], [1], [threads], streams)
    ]
    wanted = ThroughputOptions(
        batches=(GPU_BATCHES if on_gpu else BATCHES) if batches is None else tuple(sorted(batches)),
        search_s=options.budget_s / TRIALS_A_BUDGET,
        turns=options,
    )
    return throughput(contenders, pixels, wanted, progress)


def render(model: str, report: "ThroughputReport") -> str:
    """Return tables of the best rates, of how they were reached, and of all that was tried."""
    first = report.results[0]
    plural = "s"[: first.threads > 1]
    title = f"{model}, throughput, {format_size(first.size)}, {first.threads} thread{plural}"
    ended = ENDED[first.stopped].format(first.rounds)
    parts = [
        _rates(f"{title}: {ended}", report.results),
        _settings(report.results),
        _tried(report.results),
        f"{report.machine.summary()}\n",
    ]
    return "\n".join(parts)


def _rates(title: str, results: "Sequence[Throughput]") -> str:
    rows = [
        (
            *(r.name, r.images_per_second, _interval(r.images_per_second_interval)),
            f"{r.ratio:.2f}x" if r.ratio else "-",
            "baseline" if r.name == r.baseline else _interval(r.ratio_interval, ".2f"),
        )
        for r in results
    ]
    return render_table(("", "images/s", "95% interval", "ratio", "95% interval"), rows, title)


def _settings(results: "Sequence[Throughput]") -> str:
    rows = [
        (r.name, r.streams, r.threads_per_stream, r.batch, r.p50_ms, r.p99_ms, r.requests)
        for r in results
    ]
    columns = ("", "streams", "threads each", "batch", "p50 ms", "p99 ms", "requests")
    return render_table(columns, rows, "Reached with, and the time of a request meanwhile")


def _tried(results: "Sequence[Throughput]") -> str:
    batches = sorted({tried.batch for result in results for tried in result.tried})
    rows = []
    for result in results:
        rates: dict[int, dict[int, Tried]] = {}
        for tried in result.tried:
            rates.setdefault(tried.streams, {})[tried.batch] = tried
        for streams, by_batch in rates.items():
            cells = [_cell(by_batch.get(batch)) for batch in batches]
            rows.append((result.name, streams, *cells))
    columns = ("", "streams", *map(str, batches))
    return render_table(columns, rows, "Tried: images/s of each batch, in one short run")


def _cell(tried: "Tried | None") -> object:
    """Return a rate, "failed", or nothing for what was not worth a try."""
    if tried is None:
        return None
    return "failed" if tried.error else tried.images_per_second


def _interval(ends: tuple[float, float] | None, digits: str = "") -> str:
    if ends is None:
        return "-"
    return " to ".join(format(end, digits) if digits else format_cell(end) for end in ends)
