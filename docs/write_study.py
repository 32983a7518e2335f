"""Write the tables of docs/study.md from the record that `coat-deploy study` kept."""

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "study.md"
RECORD = ROOT / "docs" / "study" / "record.jsonl"
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"


def read_newest() -> dict[str, Any]:
    """Return the newest table of each kind, with the machine it was measured on."""
    newest: dict[str, Any] = {}
    for line in RECORD.read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        for kind in ("ablation", "cost"):
            if kind in document:
                newest |= {kind: document[kind], "machine": document["machine"]}
    return newest


def ablation(rows: list[dict[str, Any]]) -> str:
    """Return a table for each group of cells."""
    parts = []
    for group in dict.fromkeys(row["group"] for row in rows):
        members = [row for row in rows if row["group"] == group]
        lines = [
            f"### {group[0].upper()}{group[1:]}",
            "",
            f"| | top-1 of {members[0]['images']} images | over seeds | against the first | "
            "params | MACs | latency |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for row in members:
            seeds = ", ".join(f"{100 * share:.1f}" for share in row["top1_by_seed"])
            spread = "" if row["deviation"] is None else f" ± {100 * row['deviation']:.1f}"
            error = row["difference_error"]
            against = f"{100 * row['difference']:+.1f}" + (f" ± {100 * error:.1f}" if error else "")
            lines.append(
                f"| {row['cell']} | {100 * row['top1']:.1f}%{spread} | {seeds} | "
                f"{against if row is not members[0] else ''} | {row['parameters'] / 1e6:.2f} M | "
                f"{row['macs'] / 1e6:.1f} M | {row['latency_ms']:.2f} ms |"
            )
        parts.append("\n".join(lines))
    return "\n\n".join(parts)


def cost(rows: list[dict[str, Any]]) -> str:
    """Return the table of what the variants cost."""
    lines = [
        "### What the variants cost",
        "",
        "| | pixels | params | MACs | latency | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = "-" if row["memory_mib"] is None else f"{row['memory_mib']:.0f} MiB"
        lines.append(
            f"| {row['name']} | {row['size'][0]} | {row['parameters'] / 1e6:.2f} M | "
            f"{row['macs'] / 1e9:.2f} G | {row['latency_ms']:.1f} ms | {memory} |"
        )
    return "\n".join(lines)


def page() -> str:
    """Return the page with its tables as the record says."""
    newest = read_newest()
    machine = newest["machine"]
    about = (
        f"Latency: one image in PyTorch {machine['versions']['torch']}, float32, median, on "
        f"{machine['threads']} threads of a shared {machine['cpu']}; networks of one table "
        "measured interleaved."
    )
    tables = "\n\n".join((ablation(newest["ablation"]), cost(newest["cost"]), about))
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n\n{tables}\n\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
