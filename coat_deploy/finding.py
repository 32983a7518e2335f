"""One thing that an examination of an installation found."""

from dataclasses import dataclass
from typing import Literal

Level = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing found; `command` mends it, where a command does."""

    level: Level
    subject: str
    what: str
    command: str | None = None
