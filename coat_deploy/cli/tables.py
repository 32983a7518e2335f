"""Tables as plain text, the same on a terminal, in a pipe and in a file."""

import re
import textwrap
from collections.abc import Sequence

from rich.cells import cell_len

GAP = "  "
_NUMBER = re.compile(r"[<>]?[-+]?\d[\d.]*(e[-+]?\d+)?[x%]?|-")

LEAST_FOLDED = 24
"""A column that is folded keeps at least so many characters a line."""


def render_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[object]],
    title: str = "",
    width: int | None = None,
) -> str:
    """Return a table; columns that hold numbers are right-aligned.

    As wide as it needs to be; with `width` a last column of text is folded to fit into it.
    """
    cells = [[format_cell(cell) for cell in row] for row in rows]
    numeric = [all(_NUMBER.fullmatch(row[i]) for row in cells) for i in range(len(columns))]
    widths = [
        max(cell_len(text) for text in (columns[i], *(row[i] for row in cells)))
        for i in range(len(columns))
    ]
    lines = [title] if title else []
    for row in (list(columns), *cells) if any(columns) else cells:
        lines += _lines(row, widths, numeric, width)
    return "".join(f"{line.rstrip()}\n" for line in lines)


def render_facts(facts: Sequence[tuple[str, object]]) -> str:
    """Return names and their values, a line each."""
    return render_table(("", ""), [(name, format_cell(value)) for name, value in facts])


def format_cell(cell: object) -> str:
    """Return a cell as a person reads it: four significant digits, a dash for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.3g}" if 0 < abs(cell) < 0.01 or abs(cell) >= 1e5 else f"{cell:.4g}"
    return str(cell)


def format_share(share: float | None) -> str | None:
    """Return a share as per cent; one short of all is never rounded up to it."""
    if share is None:
        return None
    text = f"{share:.2%}"
    return ">99.99%" if share < 1 and text == "100.00%" else text


def _lines(
    row: Sequence[str], widths: Sequence[int], numeric: Sequence[bool], width: int | None
) -> list[str]:
    """Return the lines of a row: more than one where its last cell is folded."""
    parts = [_pad(*cell) for cell in zip(row, widths, numeric, strict=True)]
    start = sum(widths[:-1]) + len(GAP) * (len(widths) - 1)
    if width is None or numeric[-1] or start + cell_len(row[-1]) <= width:
        return [GAP.join(parts)]
    room = max(LEAST_FOLDED, width - start)
    folded = textwrap.wrap(row[-1], room, break_long_words=False, break_on_hyphens=False)
    first, *rest = folded or [""]
    return [GAP.join([*parts[:-1], first]), *(" " * start + line for line in rest)]


def _pad(text: str, width: int, right: bool) -> str:
    space = " " * (width - cell_len(text))
    return space + text if right else text + space
