"""Several requests computed at once: streams kept busy for a while, and what they achieve.

Each stream runs one step after another in a thread of its own. What counts begins when every
stream is at work and ends while every stream still is, so no figure is of a machine half idle.
"""

import contextlib
import gc
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from coat_deploy.measure.latency import Samples

Step = Callable[[], object]
Times = npt.NDArray[np.int64]
"""(n, 2) starts and ends of requests in ns, one after another."""

LEAD_IN_SHARE = 0.1
"""Share of a slice that is run before what counts; a request of every stream in any case."""


@dataclass(frozen=True)
class Flow:
    """What all streams did together: requests a second, and the time of each, (n,) ms."""

    requests_per_second: float
    latencies_ms: Samples


class Streams:
    """Steps that run at once, the first in the thread that asks and the others each in its own.

    Threads are kept, as a runtime may keep a team of threads for each thread that calls it.
    """

    def __init__(self, steps: Sequence[Step]) -> None:
        self._steps = tuple(steps)
        self._pool = ThreadPoolExecutor(len(steps), thread_name_prefix="stream")

    def flow(self, seconds: float, least: int = 1) -> Flow:
        """Keep all busy, and count for `seconds` and at least `least` requests of each.

        Raises: what a step raises, when all streams have stopped.
        """
        watch = _Watch(len(self._steps), seconds, max(least, 1))
        first, *rest = self._steps
        others: list[Future[Times]] = []
        with _no_collection():
            try:
                others.extend(self._pool.submit(watch.follow, step) for step in rest)
                mine = watch.follow(first)
            except BaseException:
                watch.stop()
                raise
            finally:
                wait(others)
        return summarise([mine, *(other.result() for other in others)])

    def close(self) -> None:
        """End the threads; no flow may be under way."""
        self._pool.shutdown()


def summarise(streams: Sequence[Times]) -> Flow:
    """Return what the counted requests of every stream add up to.

    A stream's rate is that of its own requests, from the start of the first to the end of the
    last, so none is cut off; the streams' rates add up.
    """
    rate = sum(len(times) / float(times[-1, 1] - times[0, 0]) for times in streams)
    latencies = np.concatenate([times[:, 1] - times[:, 0] for times in streams])
    return Flow(rate * 1e9, latencies / 1e6)


class _Watch:
    """Says to all streams when counting begins, and when all may stop."""

    def __init__(self, streams: int, seconds: float, least: int) -> None:
        self._lock = threading.Lock()
        self._leading_in = streams
        self._counting = streams
        self._over = False
        self._least = least
        self._length = round(seconds * 1e9)
        self._ready_at = time.perf_counter_ns() + round(LEAD_IN_SHARE * seconds * 1e9)
        self._begin: int | None = None

    def follow(self, step: Step) -> Times:
        """Run `step` until every stream has counted enough; return this one's counted requests."""
        try:
            self._lead_in(step)
            return self._count(step)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End all streams, since one has failed."""
        self._over = True

    def _lead_in(self, step: Step) -> None:
        step()
        while time.perf_counter_ns() < self._ready_at and not self._over:
            step()
        with self._lock:
            self._leading_in -= 1
            if not self._leading_in:
                self._begin = time.perf_counter_ns()
        while self._begin is None and not self._over:  # others still lead in
            step()

    def _count(self, step: Step) -> Times:
        clock = time.perf_counter_ns
        end = (self._begin or 0) + self._length
        times: list[tuple[int, int]] = []
        counting = True
        while not self._over:
            start = clock()
            step()
            if not counting:  # only to keep the machine as busy as it was
                continue
            times.append((start, clock()))
            if len(times) >= self._least and times[-1][1] >= end:
                counting = False
                with self._lock:
                    self._counting -= 1
                    self._over |= not self._counting
        return np.array(times, np.int64).reshape(-1, 2)


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Hold the garbage collector back, which would stop all streams."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
