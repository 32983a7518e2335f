"""One contender in a process of its own, and the handle on it that the bench holds.

A process each, because a runtime's threads keep spinning after a run and slow whoever comes
next, because peak memory is counted by process, and because a crash then ends one contender
only. The worker answers one request at a time and is quiet, measured, before it answers.
"""

import contextlib
import gc
import multiprocessing
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path

import numpy as np

from coat_deploy.errors import CoatDeployError, RunnerError
from coat_deploy.machine import peak_memory, resident_memory_mib
from coat_deploy.measure.latency import Samples
from coat_deploy.measure.page_cache import evict
from coat_deploy.measure.streams import Flow, Step, Streams
from coat_deploy.runner import Pixels, Runner

Load = Callable[[], Runner]

LEAD_IN_FROM = 4
"""Slices of that many iterations begin with one that is not timed: it refills the caches."""
QUIET_SHARE = 0.1
QUIET_CHECK_S = 0.005
QUIET_LIMIT_S = 0.5


@dataclass(frozen=True)
class Opened:
    """Cold start: a fresh process, imports included, first run with its binding.

    `file_evicted`: whether the file had left the page cache; None without a file.
    `memory_before_mib` is the resident memory before the load.
    """

    load_ms: float
    first_run_ms: float
    file_evicted: bool | None
    memory_before_mib: float | None


@dataclass(frozen=True)
class Reopened:
    """Warm start, and the peak of everything before it, where the system tells.

    `peak_memory_source`: "VmHWM" or "ru_maxrss".
    """

    load_ms: float
    first_run_ms: float
    peak_memory_mib: float | None
    peak_memory_source: str | None


@dataclass(frozen=True)
class _Open:
    load: bytes  # pickled apart, so that the imports it needs fall into the time of the load
    pixels: Pixels
    file: Path | None
    streams: int


@dataclass(frozen=True)
class _WarmUp:
    iterations: int
    seconds: float


@dataclass(frozen=True)
class _Slice:
    iterations: int


@dataclass(frozen=True)
class _Flow:
    seconds: float
    least: int


@dataclass(frozen=True)
class _Reopen:
    pass


@dataclass(frozen=True)
class _Failed:
    message: str


class Worker:
    """A contender's process. `close` ends it, whatever it is doing.

    Every method raises RunnerError, one line, when the contender fails, its process dies or no
    answer comes in `timeout_s`.
    """

    def __init__(self, name: str, timeout_s: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._timeout_s = timeout_s
        self._idle = False
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=work, args=(theirs,), name=name, daemon=True)
        try:
            with _interrupts_held():
                self._process.start()
        except OSError as error:  # no memory, no more processes
            raise RunnerError(f"{name}: its process could not start ({error}).") from None
        theirs.close()

    def open(self, load: Load, pixels: Pixels, file: Path | None, streams: int = 1) -> Opened:
        """Evict `file` from the page cache, load, bind `pixels` (B, 3, H, W) and run once.

        They are bound `streams` times, for `flow`; what is loaded must take so many calls at once.
        """
        answer = self._ask(_Open(pickle.dumps(load), pixels, file, streams))
        assert isinstance(answer, Opened)
        return answer

    def warm_up(self, iterations: int, seconds: float) -> float:
        """Run for at least so many iterations and seconds; return the last half's median in ms."""
        answer = self._ask(_WarmUp(iterations, seconds))
        assert isinstance(answer, float)
        return answer

    def time(self, iterations: int) -> Samples:
        """Return the times of `iterations` runs in ms, (iterations,)."""
        answer = self._ask(_Slice(iterations))
        assert isinstance(answer, np.ndarray)
        return answer

    def flow(self, seconds: float, least: int = 1) -> Flow:
        """Run all streams at once, and count for `seconds` and at least `least` runs of each."""
        answer = self._ask(_Flow(seconds, least))
        assert isinstance(answer, Flow)
        return answer

    def reopen(self) -> Reopened:
        """Read the peak memory, free the runner, load and run once more."""
        answer = self._ask(_Reopen())
        assert isinstance(answer, Reopened)
        return answer

    def close(self) -> None:
        """End the process, by force if need be. May be called twice."""
        self._connection.close()
        if self._idle:
            self._process.join(2)  # it ends by itself, and frees what its runtime holds
        if self._process.is_alive():
            self._process.terminate()
            self._process.join(2)
        if self._process.is_alive():
            self._process.kill()
            self._process.join(2)

    def _ask(self, request: object) -> object:
        self._idle = False
        try:
            self._connection.send(request)
            ready = wait([self._connection, self._process.sentinel], self._timeout_s)
            if not ready:
                raise RunnerError(f"no answer within {self._timeout_s:g} s; ended.")
            # A worker that answered and then died is ready twice: its answer counts.
            if self._connection not in ready and not self._connection.poll():
                raise RunnerError(self._death())
            answer = self._connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RunnerError(self._death()) from None
        self._idle = True
        if isinstance(answer, _Failed):
            raise RunnerError(answer.message)
        return answer

    def _death(self) -> str:
        self._process.join(2)
        return describe_exit(self._process.exitcode)


def describe_exit(code: int | None) -> str:
    """Return how a process ended that should not have; None where it did not end."""
    if code is None:
        return "its process closed the pipe without an answer."
    if code >= 0:
        return f"its process ended with exit status {code}."
    try:
        name = signal.Signals(-code).name
    except ValueError:
        name = f"signal {-code}"
    hint = " The kernel does so when memory runs out." if name == "SIGKILL" else ""
    return f"its process was killed by {name}.{hint}"


@contextlib.contextmanager
def _interrupts_held() -> Iterator[None]:
    """Hold Ctrl-C back while a process starts: it inherits that, until it ignores Ctrl-C."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)


def work(connection: Connection) -> None:
    """Answer requests until the other end closes: what the process runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the bench ends its workers itself
    with contextlib.suppress(OSError):
        os.dup2(2, 1)  # what a runtime prints must not mix with the results of a command
    session = _Session()
    with contextlib.suppress(EOFError, OSError):
        while True:
            connection.send(session.answer(connection.recv()))


class _Session:
    """What the worker holds between requests: the runner, its steps, what is going on."""

    def __init__(self) -> None:
        self._doing = ""
        self._load: Load | None = None
        self._pixels: Pixels | None = None
        self._num_streams = 1
        self._step: Step = lambda: None
        self._held = contextlib.ExitStack()

    def answer(self, request: object) -> object:
        try:
            reply = self._dispatch(request)
        except (Exception, SystemExit) as error:
            return _Failed(f"{self._doing}: {one_line(error)}")
        _wait_until_quiet()
        return reply

    def _dispatch(self, request: object) -> object:
        match request:
            case _Open():
                return self._open(request)
            case _WarmUp(iterations, seconds):
                return self._warm_up(iterations, seconds)
            case _Slice(iterations):
                self._doing = "run"
                if iterations >= LEAD_IN_FROM:
                    self._step()
                return _time(self._step, iterations)
            case _Flow(seconds, least):
                self._doing = "run"
                return self._streams.flow(seconds, least)
            case _Reopen():
                return self._reopen()
        raise AssertionError(request)

    def _open(self, request: _Open) -> Opened:
        evicted = None if request.file is None else evict(request.file)
        before = resident_memory_mib()
        self._pixels, self._num_streams = request.pixels, request.streams
        self._doing = "load"
        start = time.perf_counter_ns()
        self._load = pickle.loads(request.load)
        load_ms, first_run_ms = self._start(start)
        return Opened(load_ms, first_run_ms, evicted, before)

    def _start(self, start: int) -> tuple[float, float]:
        """Load, bind and run once; return the milliseconds of the load and of the rest."""
        assert self._load is not None and self._pixels is not None
        runner = self._held.enter_context(self._load())
        loaded = time.perf_counter_ns()
        self._doing = "first run"
        # Requests in use have pixels of their own, so these have too.
        copies = (self._pixels.copy() for _ in range(1, self._num_streams))
        steps = [runner.bind(pixels) for pixels in (self._pixels, *copies)]
        self._step = steps[0]
        self._streams = self._held.enter_context(contextlib.closing(Streams(steps)))
        self._step()
        return (loaded - start) / 1e6, (time.perf_counter_ns() - loaded) / 1e6

    def _warm_up(self, iterations: int, seconds: float) -> float:
        self._doing = "warm-up"
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < iterations or time.perf_counter() < end:
            times.append(float(_time(self._step, 1)[0]))
        return float(np.median(times[len(times) // 2 :]))

    def _reopen(self) -> Reopened:
        # The warm load comes last, so that the peak is that of one runner, never of two.
        peak, source = peak_memory()
        self._doing = "second load"
        self._step = lambda: None
        del self._streams
        self._held.close()
        gc.collect()
        return Reopened(*self._start(time.perf_counter_ns()), peak, source)


def _time(step: Step, iterations: int) -> Samples:
    clock = time.perf_counter_ns
    times = np.empty(iterations, np.int64)
    collecting = gc.isenabled()
    gc.disable()
    try:
        for i in range(iterations):
            start = clock()
            step()
            times[i] = clock() - start
    finally:
        if collecting:
            gc.enable()
    return times / 1e6


def _wait_until_quiet() -> None:
    """Return once this process uses no CPU: threads that spin after a run have gone to sleep.

    Measured, since every runtime spins for a time of its own: onnxruntime about 15 ms, Intel's
    OpenMP 200 ms.
    """
    end = time.perf_counter() + QUIET_LIMIT_S
    while time.perf_counter() < end:
        wall, used = time.perf_counter(), time.process_time()
        time.sleep(QUIET_CHECK_S)
        if time.process_time() - used < QUIET_SHARE * (time.perf_counter() - wall):
            return


def one_line(error: BaseException) -> str:
    """Return what an error says, with its kind if it is not one of ours."""
    text = " ".join(str(error).split())
    if len(text) > 300:
        text = text[:299] + "…"
    if isinstance(error, CoatDeployError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
