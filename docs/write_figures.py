"""Write the README's tables of figures from the records in docs/benchmarks/, one a machine."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RECORDS = ROOT / "docs" / "benchmarks"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
BASELINE = "onnxruntime:traced"
"""What ratios are over: PyTorch's own export, on the runtime it is made for."""
COLUMNS = {
    "eager": "PyTorch eager",
    "eager:compile": "torch.compile",
    BASELINE: "onnxruntime, traced",
    "onnxruntime": "onnxruntime, ours",
    "onnxruntime:int8": "onnxruntime int8, ours",
    "openvino:traced": "OpenVINO fp32, traced",
    "openvino": "OpenVINO fp32, ours",
    "openvino:bf16:traced": "OpenVINO bf16, traced",
    "openvino:bf16": "OpenVINO bf16, ours",
}
PACKAGES = {"torch": "torch", "onnxruntime": "onnxruntime", "openvino": "OpenVINO"}

Record = dict[str, Any]
Run = dict[str, Record]
"""The records of one run of one model and batch, by the name of the contender."""


def read_records() -> list[Record]:
    """Return every record of a latency, oldest first."""
    lines = [
        json.loads(line)
        for path in sorted(RECORDS.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    latencies = (line for line in lines if "p50_ms" in line and _on_a_cpu(line))
    return sorted(latencies, key=_date)


def _on_a_cpu(record: Record) -> bool:
    """Tell whether a record is of a latency on a processor."""
    return record.get("kind") is None and record.get("device", "cpu") == "cpu"


def newest_runs(records: list[Record]) -> dict[tuple[str, int], Run]:
    """Return the newest run of each model and batch that has the baseline, or the newest."""
    runs: dict[tuple[str, int], dict[str, Run]] = {}
    for record in records:
        dates = runs.setdefault((record["model"], record["batch"]), {})
        dates.setdefault(record["date"], {})[record["name"]] = record
    return {
        key: max(dates.items(), key=lambda item: (BASELINE in item[1], item[0]))[1]
        for key, dates in runs.items()
    }


def table(runs: dict[tuple[str, int], Run]) -> str:
    """Return the table: a row a model and batch, a column a contender that any of them has."""
    names = [name for name in COLUMNS if any(name in run for run in runs.values())]
    lines = [
        "| model | batch | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for (model, batch), run in runs.items():
        cells = [cell(run.get(name), run.get(BASELINE)) for name in names]
        lines.append(f"| {model} | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(record: Record | None, baseline: Record | None) -> str:
    """Return a cell: the median and how many times as fast as the baseline it is.

    The ratio is that of the medians, whatever baseline the run itself had.
    """
    if record is None:
        return "-"
    ratio = "" if baseline is None else f" ({baseline['p50_ms'] / record['p50_ms']:.2f}x)"
    return f"{record['p50_ms']:.1f} ms{ratio}"


def machines(records: list[Record]) -> list[list[Record]]:
    """Return the records of each processor, that with most of them first.

    Virtual machines name none of their models: what it can compute with tells them apart.
    """
    groups: dict[tuple[str, ...], list[Record]] = {}
    for record in records:
        machine = record["machine"]
        groups.setdefault((machine["cpu"], *machine["cpu_features"]), []).append(record)
    return sorted(groups.values(), key=len, reverse=True)


def section(records: list[Record]) -> str:
    """Return the table of one machine, and what machine it is."""
    runs = newest_runs(records)
    newest = max((record for run in runs.values() for record in run.values()), key=_date)
    machine = newest["machine"]
    features = [f for f in machine["cpu_features"] if f.startswith(("amx", "avx"))]
    versions = [
        f"{shown} {machine['versions'][name]}"
        for name, shown in PACKAGES.items()
        if name in machine["versions"]
    ]
    return f"""
{machine["threads"]} threads of a shared {machine["cpu"]} ({", ".join(features)});
{", ".join(versions)}:

{table(runs)}
"""


def figures() -> str:
    """Return what stands between the marks of the README."""
    sections = "".join(section(records) for records in machines(read_records()))
    return f"""{sections}
Median latency of a batch, and in brackets how many times as fast as PyTorch's own export
("traced": `torch.onnx.export`, dynamo, dynamic batch) is on onnxruntime, in the same run; random
weights. Absolute times of a shared machine mean little, and eager at batch 8 is unsteady, from run
to run too; [docs/benchmarks](docs/benchmarks/README.md) says how much, and holds the records with
intervals, memory and start-up times.
"""


def _date(record: Record) -> str:
    return str(record["date"])


def page() -> str:
    """Return the README with its figures as the records say."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + figures() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
