"""Write the README's table of figures from the records in docs/benchmarks/."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
RECORDS = ROOT / "docs" / "benchmarks"
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
COLUMNS = {
    "eager": "PyTorch eager",
    "eager:compile": "torch.compile",
    "onnxruntime:traced": "onnxruntime, traced",
    "onnxruntime": "onnxruntime, ours",
    "openvino": "OpenVINO fp32, ours",
    "openvino:bf16": "OpenVINO bf16, ours",
}


def read_records() -> list[dict[str, Any]]:
    """Return every record of a latency, oldest first."""
    lines = [
        json.loads(line)
        for path in sorted(RECORDS.glob("*.jsonl"))
        for line in path.read_text(encoding="utf-8").splitlines()
    ]
    lines = [record for record in lines if record.get("kind") != "throughput"]
    return sorted(lines, key=lambda record: str(record["date"]))


def table(records: list[dict[str, Any]]) -> str:
    """Return the table: a row a model and batch, of the newest run of each."""
    newest: dict[tuple[str, int], dict[str, dict[str, Any]]] = {}
    for record in records:
        run = newest.setdefault((record["model"], record["batch"]), {})
        if run and next(iter(run.values()))["date"] != record["date"]:
            run.clear()
        run[record["name"]] = record
    names = [name for name in COLUMNS if any(name in run for run in newest.values())]
    lines = [
        "| model | batch | " + " | ".join(COLUMNS[name] for name in names) + " |",
        "| --- | ---: |" + " ---: |" * len(names),
    ]
    for (model, batch), run in newest.items():
        cells = [cell(run.get(name)) for name in names]
        lines.append(f"| {model} | {batch} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(record: dict[str, Any] | None) -> str:
    """Return a cell: the median and how many times as fast as the baseline it is."""
    if record is None:
        return "-"
    ratio = "" if record["ratio"] is None else f" ({record['ratio']:.2f}x)"
    return f"{record['p50_ms']:.1f} ms{ratio}"


def figures() -> str:
    """Return what stands between the marks of the README."""
    records = read_records()
    machine = records[-1]["machine"]
    features = [f for f in machine["cpu_features"] if f.startswith(("amx", "avx512_"))]
    versions = machine["versions"]
    return f"""
{table(records)}

Median latency of a batch, and in brackets how many times as fast as PyTorch eager in the same run.
{machine["threads"]} threads of a shared {machine["cpu"]} ({", ".join(features)}); random weights;
torch {versions["torch"]}, onnxruntime {versions["onnxruntime"]}, OpenVINO {versions["openvino"]}.
Absolute times of a shared machine mean little. Eager at batch 8 is unsteady, from run to run too,
so ratios over it are rough there; [docs/benchmarks](docs/benchmarks/README.md) says how much, and
holds the records with intervals, memory and start-up times.
"""


def page() -> str:
    """Return the README with its figures as the records say."""
    text = README.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return before + BEGIN + "\n" + figures() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    README.write_text(page(), encoding="utf-8")
