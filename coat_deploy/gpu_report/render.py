"""A report as Markdown, and as a line of a record."""

import datetime
import json
from collections.abc import Sequence
from typing import Any

from coat_deploy.gpu_report.report import Report


def to_record(report: Report, command: str, date: datetime.datetime) -> str:
    """Return one line of JSON, complete in itself."""
    shared = {"date": date.isoformat(timespec="seconds"), "command": command}
    return json.dumps(shared | report.to_json(), allow_nan=False)


def to_markdown(report: Report) -> str:
    """Return its tables."""
    options, machine = report.options, report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    gpus = "; ".join(f"{gpu.name}, driver {gpu.driver}" for gpu in machine.gpus) or "no GPU"
    parts = [f"# Ways to run CoaT on {gpus}\n\n{machine.summary()}. {versions}.\n"]
    if options.device == "cpu":
        parts.append("A dry run on the CPU: its times mean nothing.\n")
    for variant in options.bench:
        rows = [row for row in report.bench if row["variant"] == variant]
        if rows:
            parts.append(f"## Speed of {variant}\n\n{_bench(rows)}\n{HOW}")
    if report.numerics:
        parts.append(f"## Distance from float64, relative\n\n{_numerics(report)}")
    if report.checks:
        parts.append("## Checks\n\n" + _list([(r["check"], _verdict(r)) for r in report.checks]))
    broken = [
        (f"{row['way']}, {row['variant']}", " ".join(row["failures"]))
        for row in report.numerics
        if row["failures"]
    ]
    for title, told in (
        ("Below the bar", broken),
        ("Failed", [(row["what"], row["why"]) for row in report.failed]),
        ("Skipped", [(row["what"], row["why"]) for row in report.skipped]),
    ):
        if told:
            parts.append(f"## {title}\n\n{_list(told)}")
    return "\n".join(parts)


TO_BEAT = "compile max-autotune"

HOW = (
    "p50 is of a batch that is waited for, by the machine's clock; on the device is by its own "
    "events, one batch after another; images/s are of batches that are launched without waiting, "
    "and the ratio is over the faster of fp16 and bf16 by torch.compile's max-autotune. Inputs "
    "take turns and lie on the device. Memory is PyTorch's, or all that the process added.\n"
)


def _bench(rows: Sequence[dict[str, Any]]) -> str:
    columns = ("", "batch", "p50 ms", "on the device ms", "images/s", "ratio", "W", "MiB")
    cells = [
        (
            row["way"], row["batch"], _cell(row["p50_ms"], 3), _cell(row["device_ms"], 3),
            _cell(row["images_per_second"]), _ratio(row, rows), _cell(row["power_w"]),
            _cell(row["memory_mib"] or row["device_memory_mib"]),
        )
        for row in sorted(rows, key=lambda row: int(row["batch"]))
    ]  # fmt: skip
    return _table(columns, cells)


def _ratio(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> str:
    """Return how many times as many images as PyTorch's best compiler: what there is to beat."""
    peers = [
        float(r["images_per_second"])
        for r in rows
        if r["way"].startswith(TO_BEAT) and r["batch"] == row["batch"]
    ]
    return f"{row['images_per_second'] / max(peers):.2f}x" if peers else "-"


def _numerics(report: Report) -> str:
    variants = [v for v in report.options.variants if any(_of(report, v))]
    ways = list(dict.fromkeys(row["way"] for row in report.numerics))
    found = {(row["way"], row["variant"]): row for row in report.numerics}
    cells = [(way, *(_distance(found.get((way, variant))) for variant in variants)) for way in ways]
    return _table(("", *variants), cells)


def _of(report: Report, variant: str) -> list[bool]:
    return [row["variant"] == variant for row in report.numerics]


def _distance(row: dict[str, Any] | None) -> str:
    value = row and row["relative_to_float64"]
    return "-" if value is None else f"{value:.2g}"


def _verdict(row: dict[str, Any]) -> str:
    return "yes" if row["passed"] else "NO"


def _cell(value: float | None, digits: int = 0) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * (len(columns) - 1)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def _list(rows: Sequence[tuple[str, str]]) -> str:
    return "".join(f"- {what}: {why}\n" for what, why in rows)
