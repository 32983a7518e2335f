"""Work in a process of its own, which may crash, hang or run out of memory without harm to ours.

What it tells on the way is kept, whatever comes of it afterwards.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from coat_deploy.errors import CoatDeployError
from coat_deploy.measure.worker import describe_exit, one_line

Tell = Callable[[dict[str, Any]], None]
Work = Callable[..., None]
"""Called with what it tells its findings to, and its arguments; a module's function."""


@dataclass
class Told:
    """What a process told before it ended; `error` says how, if not by itself."""

    findings: list[dict[str, Any]] = field(default_factory=list)
    error: str | None = None
    seconds: float = 0.0


def run_apart(work: Work, arguments: Sequence[Any], timeout_s: float) -> Told:
    """Run `work` in a process, with whatever that starts, for at most `timeout_s`."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    told, start = Told(), time.monotonic()
    with tempfile.NamedTemporaryFile("r", errors="replace") as noise:
        process = context.Process(target=_work, args=(theirs, noise.name, work, arguments))
        process.start()
        theirs.close()
        try:
            told.error = _listen(ours, process, told.findings, start + timeout_s)
            if told.error is None:
                process.join(10)
                if process.exitcode:
                    told.error = describe_exit(process.exitcode) + _last_line(noise)
            elif told.error == "":
                told.error = f"not done within {timeout_s:.0f} s; ended"
        finally:
            _end(process)
    told.seconds = time.monotonic() - start
    return told


def _listen(
    connection: Connection, process: Any, findings: list[dict[str, Any]], end: float
) -> str | None:
    """Collect what is told until the other end closes; return its error, "" when time is up."""
    while True:
        left = end - time.monotonic()
        if left <= 0 or not wait([connection], left):
            return ""
        try:
            kind, value = connection.recv()
        except (EOFError, OSError):
            return None
        if kind == "failed":
            return str(value)
        findings.append(value)


def _work(connection: Connection, noise: str, work: Work, arguments: Sequence[Any]) -> None:
    """Do the work: what the process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(os, "setsid"):
        os.setsid()  # compilers that it starts end with it
    with open(noise, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    try:
        work(lambda finding: connection.send(("told", finding)), *arguments)
    except (Exception, SystemExit) as error:
        if not isinstance(error, CoatDeployError):
            traceback.print_exc()
        with contextlib.suppress(OSError):
            connection.send(("failed", one_line(error)))
    finally:
        connection.close()


def _end(process: Any) -> None:
    """End the process and what it started."""
    if process.is_alive() and process.pid:
        if hasattr(os, "killpg"):
            with contextlib.suppress(OSError):
                os.killpg(process.pid, signal.SIGKILL)
        process.kill()
    process.join(10)


def _last_line(noise: Any) -> str:
    """Return the last thing a process said, in brackets."""
    lines = [line.strip() for line in noise.read().splitlines() if line.strip()]
    return f" ({lines[-1][:200]})" if lines else ""
