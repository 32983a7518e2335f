"""What `bench` measured, as text: speed, what it is held against, start and memory."""

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from coat_deploy.cli.tables import format_cell, render_table
from coat_deploy.spec import Size, format_size

if TYPE_CHECKING:
    from coat_deploy.measure.bench import BenchReport
    from coat_deploy.measure.latency import Latency
    from coat_deploy.measure.limits import Limits

WIDTH = 80
Agreements = Mapping[str, Mapping[str, Any]]
"""What the replay of its proof found, by the name of a contender."""


def render(
    model: str, report: "BenchReport", agreements: Agreements, limits: "Limits | None"
) -> str:
    """Return tables of speed a group of contenders, and one of start and memory."""
    groups: dict[tuple[int, Size, int | None], list[Latency]] = {}
    for result in report.results:
        groups.setdefault((result.batch, result.size, result.threads), []).append(result)
    parts = []
    for results in groups.values():
        parts.append(_speed(model, results))
        if any(result.peer or result.limit_share is not None for result in results):
            parts.append(_standing(results, agreements))
    if limits is not None:
        parts.append(explain(limits))
    parts.append(_start_and_memory(report.results))
    parts.append(f"{report.machine.summary()}\n")
    return "\n".join(parts)


def _speed(model: str, results: "Sequence[Latency]") -> str:
    first = results[0]
    ended = {
        "stable": f"stable after {first.rounds} rounds",
        "budget": f"ended by --budget after {first.rounds} rounds",
    }
    threads = f", {_threads(first.threads)}" if first.threads else ""
    title = f"{model}, batch {first.batch}, {format_size(first.size)}{threads}"
    rows = [
        (
            *(r.name, r.p50_ms, r.p90_ms, r.p99_ms, r.images_per_second),
            _ratio(r.ratio),
            "baseline" if r.name == r.baseline else _interval(r.ratio_interval),
        )
        for r in results
    ]
    columns = ("", "p50 ms", "p90 ms", "p99 ms", "images/s", "ratio", "95% interval")
    return render_table(columns, rows, f"{title}: {ended[first.stopped]}")


def _standing(results: "Sequence[Latency]", agreements: Agreements) -> str:
    """Return what each is held against: the traced graph, the machine's limit, PyTorch."""
    columns: list[str] = [""]
    rows: list[list[object]] = [[result.name] for result in results]
    if any(result.peer for result in results):
        columns += ["over traced", "95% interval"]
        for row, result in zip(rows, results, strict=True):
            row += [_ratio(result.peer_ratio), _interval(result.peer_ratio_interval)]
    if any(result.limit_share is not None for result in results):
        columns.append("of limit")
        for row, result in zip(rows, results, strict=True):
            row.append("-" if result.limit_share is None else f"{result.limit_share:.0%}")
    columns.append("agreement with PyTorch")
    for row, result in zip(rows, results, strict=True):
        row.append(_agreement(result.precision, agreements.get(result.name)))
    return render_table(columns, rows) + _unlike_peers(results)


def _unlike_peers(results: "Sequence[Latency]") -> str:
    """Name those whose precision is not that of what they are held against."""
    precisions = {result.name: result.precision for result in results}
    return "".join(
        f"{r.name} is held against {r.peer}, which computes in {precisions[r.peer]}.\n"
        for r in results
        if r.peer and precisions.get(r.peer, r.precision) != r.precision
    )


def _agreement(precision: str, agreement: Mapping[str, Any] | None) -> str:
    """Return the figure that tells most: a difference where it should be none, else a cosine."""
    if agreement is None:
        return "-"
    if precision == "fp32":
        return f"max |delta| {format_cell(agreement['max_abs_difference'])}"
    cosine = agreement["centred_cosine"]
    return "centred cosine " + ("-" if cosine is None else f"{cosine:.6f}")


def explain(limits: "Limits") -> str:
    """Return what the column "of limit" means, with the rates it rests on."""
    parts = []
    for bandwidth in limits.bandwidths:
        rates = [rate for rate in limits.rates if rate.threads == bandwidth.threads]
        figures = ", ".join(f"{r.target} {r.precision} {r.gflops:.0f} GFLOP/s" for r in rates)
        several = f"{_threads(bandwidth.threads)}: " if len(limits.bandwidths) > 1 else ""
        parts.append(f"{several}{figures}; memory {bandwidth.gb_per_s:.1f} GB/s")
    text = (
        "of limit: how much of p50 is the least time that this machine allows. It is that of "
        f"the network's 2 x {_millions(limits.work.macs)} operations an image, at the rate at "
        "which the same runtime multiplies large matrices here, or that of reading weights and "
        "images once, where that is longer. PyTorch is held against the fastest runtime of its "
        f"precision. Measured: {'. '.join(parts)}."
    )
    return textwrap.fill(text, WIDTH, break_on_hyphens=False) + "\n"


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


def _millions(count: int) -> str:
    return f"{count / 1e9:.2f} G" if count >= 1e8 else f"{count / 1e6:.2f} M"


def _threads(count: int | None) -> str:
    if count is None:
        return "one thread a core"
    return f"{count} thread{'s'[: count != 1]}"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _interval(ends: tuple[float, float] | None) -> str:
    return "-" if ends is None else f"{ends[0]:.2f} to {ends[1]:.2f}"
