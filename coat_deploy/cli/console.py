"""What all commands share: output, progress, errors, and the options that recur.

Results go to stdout, as a table or, with `--json`, as one object; everything else to stderr, and
progress only when that is a terminal. Nothing heavy is imported here.
"""

import contextlib
import functools
import json
import logging
import os
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, ParamSpec, TypeVar

import typer

from coat_deploy.cli.tables import render_table
from coat_deploy.errors import CoatDeployError, RunnerError, UsageError

P = ParamSpec("P")
R = TypeVar("R")

NAME = "coat-deploy"
SIGNALS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "terminated",
    getattr(signal, "SIGHUP", signal.SIGTERM): "terminated",
}
"""Signals that ask us to end, and what we say then."""

_EXTRAS = {
    **dict.fromkeys(("torch", "onnx", "onnxscript", "safetensors"), "torch"),
    "accelerate": "train",
    **dict.fromkeys(("ray", "pyarrow"), "ray"),
    **dict.fromkeys(("starlette", "uvicorn", "httptools", "orjson", "prometheus_client"), "serve"),
}
"""Modules that a machine which only runs artifacts does without, and the extra they are of."""

settings = {"debug": False}


def complete_model(context: typer.Context, incomplete: str) -> list[str]:
    """Return the names of models that begin with `incomplete`, for the shell to offer."""
    from coat_deploy.repository import Repository

    models = context.params.get("models")
    known = Repository.open(Path(models) if models else None).models()
    return [model.name for model in known if model.name.startswith(incomplete)]


def _thread_count(count: int | None) -> int | None:
    if count is not None and not 1 <= count <= 1024:
        raise typer.BadParameter(f"must be 1 to 1024 (got {count}).")
    return count


ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        autocompletion=complete_model,
        help="Name of a model, or the path of its folder (with a slash in it).",
    ),
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
JsonOption = Annotated[
    bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout.")
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(
        "--threads",
        metavar="N",
        callback=_thread_count,
        help="Compute threads. Default: one a core.",
    ),
]
DeviceOption = Annotated[
    str,
    typer.Option(
        "--device",
        metavar="NAME",
        help="cpu, or cuda: the first NVIDIA GPU, for eager and onnxruntime.",
    ),
]
ProviderOption = Annotated[
    str | None,
    typer.Option(
        "--provider",
        metavar="NAME",
        help="What onnxruntime computes by with --device cuda: cuda or tensorrt. Default: cuda.",
    ),
]
StrictOption = Annotated[
    bool,
    typer.Option(
        "--strict", metavar="", help="Exit 1 if an image cannot be read, not only tell it."
    ),
]


def guarded(command: Callable[P, R]) -> Callable[P, R]:
    """Turn errors that are the user's to mend, and signals, into one line and an exit status."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        with _interrupted_by_signals() as received:
            try:
                return command(*args, **kwargs)
            except BrokenPipeError:
                _silence(sys.stdout)  # whoever read our output has enough
                raise typer.Exit(0) from None
            except (Exception, KeyboardInterrupt) as error:
                # An import or a runtime that a signal meets may make any other error of it.
                status, message = _explain(error, received)
                if message is None:
                    raise
                if settings["debug"]:
                    traceback.print_exc()
                fail(message, status)

    return run


def _explain(error: BaseException, received: Sequence[int]) -> tuple[int, str | None]:
    """Return exit status and message for what ended a command; None for our own mistakes."""
    if isinstance(error, KeyboardInterrupt) or received:
        number = received[0] if received else signal.SIGINT
        return 128 + number, f"{SIGNALS[signal.Signals(number)]}; nothing was left half done."
    if isinstance(error, CoatDeployError):
        return error.exit_status, str(error)
    if isinstance(error, ModuleNotFoundError) and error.name in _EXTRAS:
        return 1, (
            f"package {error.name} is not installed, and this command needs it. "
            f'Run: pip install "coat-deploy[{_EXTRAS[error.name]}]"'
        )
    if isinstance(error, MemoryError):
        return 1, "out of memory. Use a smaller --batch or --size."
    return 1, None


@contextlib.contextmanager
def _interrupted_by_signals() -> Iterator[list[int]]:
    """Let signals raise KeyboardInterrupt, so that what is open is cleaned up; note which came.

    One that is ignored, as under nohup, stays so.
    """
    received: list[int] = []

    def interrupt(number: int, _frame: object) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    before = {s: signal.getsignal(s) for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, interrupt)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fail(message: str, status: int) -> NoReturn:
    """Print one line on stderr and exit."""
    note(f"{NAME}: {' '.join(message.split())}")
    raise typer.Exit(status)


def note(message: str) -> None:
    """Tell the user something that is not the result, on stderr."""
    with contextlib.suppress(BrokenPipeError):
        print(message, file=sys.stderr, flush=True)


def hint(message: str) -> None:
    """Suggest the next step, on stderr, to a person: not in logs."""
    if sys.stderr.isatty():
        note(f"\n{message}")


def emit(text: str) -> None:
    """Write results to stdout, at once.

    When nobody reads them (`| head -1`) the work goes on all the same, and the exit status says
    what it came to. Raises: RunnerError when they cannot be written, on a full disk.
    """
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence(sys.stdout)
    except OSError as error:
        _silence(sys.stdout)
        raise RunnerError(f"stdout: cannot be written ({error.strerror}).") from None


def _silence(stream: Any) -> None:
    """Point a stream that failed at nothing, so that Python does not fail over it at exit."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, stream.fileno())
    os.close(nothing)


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one object of `--json`; not-a-number has no place in JSON."""
    emit(json.dumps(document, indent=2, allow_nan=False) + "\n")


def print_table(columns: Sequence[str], rows: Sequence[Sequence[object]], title: str = "") -> None:
    """Print a table on stdout; on a terminal a long last column is folded."""
    emit(render_table(columns, rows, title, terminal_width()))


def terminal_width() -> int | None:
    """Return the columns of the terminal that stdout is, or None."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def styled(text: str, colour: str) -> str:
    """Return `text` bold and coloured where stdout is a terminal that wants colours."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    if plain or not sys.stdout.isatty():
        return text
    return typer.style(text, fg=colour, bold=True)


@contextlib.contextmanager
def progress_bar(title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show a bar on stderr while the body runs; call the value with each amount done."""
    if not sys.stderr.isatty():
        yield lambda amount: None
        return
    from rich import progress
    from rich.console import Console

    with progress.Progress(
        progress.SpinnerColumn(),
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    ) as bar:
        task = bar.add_task(title, total=total)
        yield lambda amount: bar.update(task, advance=amount)


@contextlib.contextmanager
def steps(title: str) -> Iterator[Callable[[str], None]]:
    """Show on stderr which step is under way; call the value with its name."""
    if not sys.stderr.isatty():
        yield lambda step: None
        return
    from rich.console import Console
    from rich.markup import escape

    with Console(stderr=True).status(escape(title)) as status:
        yield lambda step: status.update(escape(f"{title}: {step}"))


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
        # Unicode has more decimals than ours, and very long numbers take very long.
        if not (part.isascii() and part.isdigit() and len(part) < 10):
            raise UsageError(f"--{what}: must be whole numbers, 1 to {largest} (got {part!r}).")
        if not 1 <= int(part) <= largest:
            raise UsageError(f"--{what}: must be 1 to {largest} (got {part}).")
        numbers.append(int(part))
    return list(dict.fromkeys(numbers))


def configure(debug: bool, verbose: bool) -> None:
    """Set how errors are shown and how much the library tells."""
    settings["debug"] = debug
    level = logging.INFO if verbose or debug else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("coat_deploy").setLevel(level)
    # Pillow warns in Python's way of torn EXIF blocks and the like; the pixels are sound.
    warnings.filterwarnings("ignore", module=r"PIL\.")
