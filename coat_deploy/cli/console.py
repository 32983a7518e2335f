"""What all commands share: output, progress, errors, and the options that recur.

Results go to stdout, as a table or, with `--json`, as one object; everything else to stderr, and
progress only when that is a terminal. Nothing heavy is imported here.
"""

import contextlib
import functools
import json
import logging
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from coat_deploy.errors import CoatDeployError, UsageError

P = ParamSpec("P")
R = TypeVar("R")

INTERRUPTED = 130

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of a model, or the path of its folder.")
]
ModelsOption = Annotated[
    Path | None,
    typer.Option(
        "--models",
        metavar="DIR",
        help="Model repository to look in first and to write to. "
        "Then $COAT_MODELS, ./models and the published configs.",
    ),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
ThreadsOption = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=1024, help="Compute threads; default: one a core."),
]

settings = {"debug": False}


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors that are the user's to mend into one line and an exit status."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        signal.signal(signal.SIGTERM, _terminate)
        try:
            return command(*args, **kwargs)
        except CoatDeployError as error:
            if settings["debug"]:
                raise
            fail(str(error), error.exit_status)
        except KeyboardInterrupt:
            fail("interrupted; nothing was left half done.", INTERRUPTED)
        except BrokenPipeError:
            # Whoever read our output has enough; Python would complain once more at exit.
            sys.stderr.close()
            raise typer.Exit(0) from None
        except MemoryError:
            fail("out of memory. Use a smaller --batch or --size.", 1)

    return run


def fail(message: str, status: int) -> NoReturn:
    """Print one line on stderr and exit."""
    print(f"coat-deploy: {message}", file=sys.stderr)
    raise typer.Exit(status)


def _terminate(_signal: int, _frame: object) -> NoReturn:
    """Leave by an exception, so that what is open is cleaned up."""
    raise SystemExit(128 + signal.SIGTERM)


def note(message: str) -> None:
    """Tell the user something that is not the result, on stderr."""
    print(message, file=sys.stderr)


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one object of `--json`; not-a-number has no place in JSON."""
    print(json.dumps(document, indent=2, allow_nan=False))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a table on stdout; columns after the first are right-aligned when they hold numbers."""
    print(render_table(columns, rows, title), end="")


def render_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> str:
    """Return a table as text, as wide as it needs to be."""
    table = Table(title=title or None, title_justify="left", title_style="bold", box=None)
    for i, column in enumerate(columns):
        cells = [row[i] for row in rows]
        numeric = all(cell is None or isinstance(cell, int | float) for cell in cells)
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    for row in rows:
        table.add_row(*(format_cell(cell) for cell in row))
    console = Console(width=max(40, _width(table)), file=sys.stdout, highlight=False)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    return "\n".join(lines) + "\n"


def _width(table: Table) -> int:
    return Console(width=400).measure(table).maximum


def format_cell(cell: object) -> str:
    """Return a cell as a person reads it: four significant digits, blank for nothing."""
    if cell is None:
        return "-"
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, float):
        return f"{cell:.3g}" if 0 < abs(cell) < 0.01 else f"{cell:.4g}"
    return str(cell)


@contextlib.contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the body runs; call the value with each amount done."""
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
        disable=not sys.stderr.isatty(),
    )
    with bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.update(task, advance=amount)


@contextlib.contextmanager
def steps(title: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr which step is under way; call the value with its name."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    with Console(stderr=True).status(title) as status:
        yield lambda step: status.update(f"{title}: {step}")


def comma_separated(text: str, what: str) -> list[str]:
    """Return the parts of "a,b". Raises UsageError when there is none."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise UsageError(f"--{what}: nothing given (got {text!r}). Separate values by commas.")
    return parts


def counts(text: str, what: str, largest: int = 65536) -> list[int]:
    """Return the numbers of "1,8", each 1 to `largest`. Raises UsageError."""
    numbers = []
    for part in comma_separated(text, what):
        if not part.isdecimal() or not 1 <= int(part) <= largest:
            raise UsageError(f"--{what}: must be 1 to {largest} (got {part!r}).")
        numbers.append(int(part))
    return list(dict.fromkeys(numbers))


def configure(debug: bool, verbose: bool) -> None:
    """Set how errors are shown and how much the library tells."""
    settings["debug"] = debug
    level = logging.INFO if verbose or debug else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("coat_deploy").setLevel(level)
