"""Several server processes on one port: started, watched, ended together.

The socket is bound once and handed to all; the kernel gives each connection to one of them. Each
loads the models itself, with its share of the threads.
"""

import contextlib
import dataclasses
import logging
import multiprocessing
import os
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.process import BaseProcess
from types import FrameType

from coat_deploy.errors import CoatDeployError, ServerError, UsageError
from coat_deploy.machine import usable_threads
from coat_deploy.serve.options import ListenOptions, ServeOptions

_log = logging.getLogger(__name__)

WATCH_S = 0.2
GRACE_S = 10.0
"""How much longer than a process's own limits we wait for its end."""
METRICS_DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"

Tell = Callable[[str], None]


def check(options: ServeOptions, listen: ListenOptions) -> None:
    """Raise UsageError for what several processes cannot do."""
    threads = options.threads or usable_threads()
    if listen.workers > threads:
        raise UsageError(
            f"--workers: each needs a thread (got {listen.workers} processes and {threads} "
            "threads). Ask for fewer."
        )
    if listen.workers > 1 and options.allow_load:
        raise UsageError(
            "--allow-load: a client's wish would reach one process of --workers. Leave one out."
        )


def serve(options: ServeOptions, listen: ListenOptions, place: socket.socket, tell: Tell) -> None:
    """Serve in `listen.workers` processes until a signal.

    Raises: ServerError when one ends by itself; the others are ended then.
    """
    threads = (options.threads or usable_threads()) // listen.workers
    share = dataclasses.replace(options, threads=threads)
    context = multiprocessing.get_context("spawn")
    with _metrics_directory(), _ended_by_signals() as ended:
        started = [
            context.Process(target=_process, args=(share, listen, place), name=f"server {i}")
            for i in range(listen.workers)
        ]
        for process in started:
            process.start()
        place.close()  # theirs now; with ours open, connections would wait for nobody at the end
        try:
            while not ended and all(process.is_alive() for process in started):
                time.sleep(WATCH_S)
        finally:
            _end(started, listen)
    # One that was still starting ends by the signal itself; it had taken nothing.
    fine = (0, -signal.SIGTERM) if ended else (0,)
    failed = [process for process in started if process.exitcode not in fine]
    if failed or not ended:
        status = failed[0].exitcode if failed else 0
        raise ServerError(
            f"a server process ended by itself (status {status}); the others were ended. "
            "Its last lines say why."
        )
    tell("ended")


def _process(options: ServeOptions, listen: ListenOptions, place: socket.socket) -> None:
    from coat_deploy.serve import server

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal; the parent says when to end
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("coat_deploy.serve").setLevel(logging.INFO)

    def tell(message: str) -> None:
        _log.info("process %d: %s", os.getpid(), message)

    try:
        server.serve(options, listen, place, tell)
    except CoatDeployError as error:
        _log.error("%s", error)
        raise SystemExit(error.exit_status) from None


def _end_with_parent() -> None:
    """End as asked when the parent is gone, however it went: the port must not stay taken."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGTERM)


def _end(started: Sequence[BaseProcess], listen: ListenOptions) -> None:
    for process in started:
        process.terminate()
    until = time.monotonic() + listen.drain_delay_s + listen.drain_s + GRACE_S
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


@contextlib.contextmanager
def _metrics_directory() -> Iterator[None]:
    """Let the processes keep their metrics where each can add them up."""
    if os.environ.get(METRICS_DIRECTORY):
        yield
        return
    with tempfile.TemporaryDirectory(prefix="coat-metrics-") as folder:
        os.environ[METRICS_DIRECTORY] = folder
        try:
            yield
        finally:
            del os.environ[METRICS_DIRECTORY]


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[list[int]]:
    """Note signals that ask us to end, for the children to be asked in turn."""
    ended: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        ended.append(number)

    taken = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield ended
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
