"""Text of the user's, the names of classes and folders, made safe for Markdown and pictures."""

import re
import unicodedata
from collections.abc import Iterable, Sequence

_SPECIAL = re.compile(r"[\\`*_\[\]<>(){}|~$&#@:!^\"]")
_NO_CHARACTERS = "\ufffe\uffff"


def printable(text: str) -> str:
    """Return `text` on one line, without what UTF-8, XML or YAML cannot hold.

    A file name may hold line breaks, control characters and bytes that are no UTF-8.
    """
    return " ".join(
        "".join(
            "\N{REPLACEMENT CHARACTER}"
            if unicodedata.category(character) in ("Cc", "Cs") or character in _NO_CHARACTERS
            else character
            for character in word
        )
        for word in text.split()
    )


def escape(text: str) -> str:
    """Return `text` so that Markdown shows it as it is: in a cell of a table, or in a sentence.

    Not at the beginning of a paragraph, where "- x" and "1. x" would be lists.
    """
    return _SPECIAL.sub(r"\\\g<0>", printable(text))


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], texts: int = 1) -> str:
    """Return a table of cells that are Markdown.

    The first `texts` columns are aligned left, the others, which hold numbers, right.
    """
    rule = ["---" if i < texts else "---:" for i in range(len(columns))]
    return "".join(f"| {' | '.join(row)} |\n" for row in (columns, rule, *rows))


def facts_table(rows: Iterable[tuple[str, str]]) -> str:
    """Return names and their values as a table without a head."""
    return table(("", ""), rows, texts=2)
