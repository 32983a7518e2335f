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
        streams = [mine, *(other.result() for other in others)]
        assert watch.begin is not None
        return summarise(streams, watch.begin, watch.end)

    def close(self) -> None:
        """End the threads; no flow may be under way."""
        self._pool.shutdown()


def summarise(streams: Sequence[Times], begin: int, end: int) -> Flow:
    """Return what all streams did from `begin` to `end`, ns.

    A request that lies partly outside counts with the share of its time that lies inside. Rates
    of streams taken apart would not add up: where one waits for another, each is quick in turn.
    Latencies are those of requests that lie inside altogether.
    """
    starts, ends = np.concatenate(streams).T
    inside = np.minimum(ends, end) - np.maximum(starts, begin)
    requests = np.sum(np.maximum(inside, 0) / np.maximum(ends - starts, 1))
    whole = (starts >= begin) & (ends <= end)
    return Flow(float(requests) * 1e9 / max(end - begin, 1), (ends - starts)[whole] / 1e6)


class _Watch:
    """Says to all streams when counting begins, and when all may stop."""

    def __init__(self, streams: int, seconds: float, least: int) -> None:
        self._lock = threading.Lock()
        self._leading_in = self._counting = streams
        self._least = least
        self._length = round(seconds * 1e9)
        self._ready_at = time.perf_counter_ns() + round(LEAD_IN_SHARE * seconds * 1e9)
        self._stopped = False
        self.begin: int | None = None
        self.end = 0

    def stop(self) -> None:
        """End all streams, since one has failed."""
        self._stopped = True

    def follow(self, step: Step) -> Times:
        """Run `step` until every stream has counted enough; return the times of all runs."""
        clock = time.perf_counter_ns
        times: list[tuple[int, int]] = []
        led_in = counted = False
        try:
            while not self._stopped:
                start = clock()
                step()
                times.append((start, clock()))
                if not led_in:
                    led_in = self._leads_in(times[-1][1])
                elif not counted:
                    counted = self._counts(times)
        except BaseException:
            self.stop()
            raise
        return np.array(times, np.int64).reshape(-1, 2)

    def _leads_in(self, now: int) -> bool:
        """Tell whether a stream has led in; when it is the last, counting begins."""
        if now < self._ready_at:
            return False
        with self._lock:
            self._leading_in -= 1
            if not self._leading_in:
                self.begin = time.perf_counter_ns()
        return True

    def _counts(self, times: Sequence[tuple[int, int]]) -> bool:
        """Tell whether a stream has counted enough; when it is the last, all stop."""
        begin, now = self.begin, times[-1][1]
        if begin is None or now < begin + self._length:
            return False
        if len(times) < self._least or times[-self._least][0] < begin:
            return False
        with self._lock:
            self._counting -= 1
            if not self._counting:
                self.end = now
                self._stopped = True
        return True


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
