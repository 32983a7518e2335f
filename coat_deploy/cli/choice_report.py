"""What `export --precision auto` compared, as text."""

from collections.abc import Mapping
from typing import Any

from coat_deploy.cli.tables import render_table
from coat_deploy.spec import format_size

COLUMNS = ("precision", "max |delta|", "centred cosine", "median ms", "ratio", "")


def render_choice(choice: Mapping[str, Any], width: int | None = None) -> str:
    """Return a table of the precisions of `Choice.to_json`, and why one was chosen.

    Reasons are folded to `width`, where it is given.
    """
    rows, why = [], []
    for one in choice["considered"]:
        cosine, ratio = one["centred_cosine"], one["ratio"]
        rows.append(
            (
                *(one["precision"], one["max_abs_difference"]),
                None if cosine is None else f"{cosine:.6f}",
                one["p50_ms"],
                None if ratio is None else f"{ratio:.2f}x",
                one["verdict"],
            )
        )
        why.append((f"{one['precision']}:", one["reason"]))
    figures = render_table(COLUMNS, rows, _title(choice))
    return f"{figures}\n{render_table(('', ''), why, width=width)}"


def _title(choice: Mapping[str, Any]) -> str:
    """Return how it was measured, where there was anything to measure."""
    if all(one["p50_ms"] is None for one in choice["considered"]):
        return "Nothing to measure against:"
    count = choice["threads"]
    threads = f", {count} thread{'s'[: count != 1]}" if count else ""
    return f"Measured at batch {choice['batch']}, {format_size(choice['size'])}{threads}:"
