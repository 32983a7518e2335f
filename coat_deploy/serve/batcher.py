"""The queues of all models, and the threads that empty them.

    submit > lane (one a model, bounded) > idle worker > runner > answer

Eager: an idle worker takes what waits, at once; there is no timer, and a batch forms only while all
are at work. Fair: the lane next is that on which the workers have spent the least time, so a model
that is asked much, or is slow, does not keep another waiting. What is past its deadline, or whose
client is gone, is dropped before it is computed.
"""

import asyncio
import functools
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from coat_deploy.errors import CoatDeployError, ImageError, RequestError
from coat_deploy.runner import Pixels, Runner
from coat_deploy.serve.jobs import Job, Outputs, Work
from coat_deploy.serve.levels import Levels
from coat_deploy.serve.options import Limits
from coat_deploy.serve.precedence import step_back
from coat_deploy.serve.statistics import Execution, Listener, Outcome

_log = logging.getLogger(__name__)

FIRST_GUESS_NS = 50_000_000
"""Time of an image before any was computed, to say when to come again."""


class Lane:
    """A model's queue. Fields belong to the batcher's lock.

    `spent_ns` is the time workers have spent on it, for the order among lanes.
    """

    def __init__(self, name: str, levels: Levels, listeners: Sequence[Listener]) -> None:
        self.name, self.levels, self.listeners = name, levels, tuple(listeners)
        self.waiting: deque[Job] = deque()
        self.waiting_images = self.waiting_bytes = 0
        self.running = 0
        self.turn = threading.Semaphore(levels.streams)
        self.spent_ns = self.image_ns = 0
        self.retired = False

    @property
    def takes_a_worker(self) -> bool:
        """Whether there is something to do for one more.

        One more than the runners take may decode what will be next.
        """
        ahead = self.levels.batch > 1 and bool(self.waiting) and self.waiting[0].work.encoded
        return bool(self.waiting) and self.running < self.levels.streams + ahead

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing is computed."""
        return not self.waiting and not self.running


@dataclass(frozen=True)
class Part:
    """Some images of a job."""

    job: Job
    start: int
    count: int


@dataclass(frozen=True)
class Batch:
    """What a worker took: parts of jobs of one lane, and the runner for them."""

    lane: Lane
    parts: Sequence[Part]
    runner: Runner


class Batcher:
    """Runs jobs of any number of lanes in `workers` threads."""

    def __init__(self, workers: int, limits: Limits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._lanes: list[Lane] = []
        self._busy = self._idle = 0
        # A wake-up each. Condition would do, in Python, on the way of a request that comes alone.
        self._calls: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._reached_ns = 0
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, name=f"worker {i}", daemon=True)
            for i in range(workers)
        ]
        for thread in self._threads:
            thread.start()

    def add(self, lane: Lane) -> None:
        """Take a lane in."""
        with self._lock:
            lane.spent_ns = self._reached_ns
            self._lanes.append(lane)

    def retire(self, lane: Lane) -> None:
        """Compute what waits in a lane, then take it out and close its runners."""
        with self._lock:
            lane.retired = True
            gone = self._remove_if_done(lane)
        if gone:
            lane.levels.close()

    def close(self) -> None:
        """Answer what waits by an error, end the threads and close all runners."""
        with self._lock:
            self._closed = True
            left = [job for lane in self._lanes for job in lane.waiting]
            for lane in self._lanes:
                lane.waiting.clear()
            self._call(self._idle)
        for job in left:
            job.settle(RequestError("the server ends. Ask another.", "unavailable"))
        for thread in self._threads:
            thread.join()
        for lane in self._lanes:
            lane.levels.close()
        self._lanes.clear()

    @property
    def pending(self) -> int:
        """Requests that wait or are computed."""
        with self._lock:
            return sum(len(lane.waiting) + lane.running for lane in self._lanes)

    def check_room(self, lane: Lane, num_bytes: int = 0) -> None:
        """Raise RequestError when a lane takes no more; cheap, for before a body is read."""
        with self._lock:
            self._check_room(lane, num_bytes)

    async def run(self, lane: Lane, work: Work, deadline: float) -> Outputs:
        """Return what a lane makes of some images.

        Raises: RequestError when there is no room for it, when it is too late, or when the runtime
        fails; ImageError for what is no image.
        """
        loop = asyncio.get_running_loop()
        job = Job(work, deadline, loop.create_future())
        left_s = deadline - time.monotonic()
        late = loop.call_later(max(left_s, 0), job.expire)
        outcome: str | None = "cancelled"
        try:
            if left_s <= 0:
                job.expire()
            else:
                self._submit(lane, job)
            outputs = await job.answer
            outcome = None
            return outputs
        except RequestError as error:
            outcome = error.kind
            raise
        except ImageError:
            outcome = "invalid"
            raise
        finally:
            late.cancel()
            if outcome:
                self._drop(lane, job)
            loop.call_soon(_tell_finished, lane, job, outcome, time.perf_counter_ns())

    def _submit(self, lane: Lane, job: Job) -> None:
        with self._lock:
            self._check_room(lane, job.work.num_bytes)
            if lane.idle:  # being idle earns no credit
                lane.spent_ns = max(lane.spent_ns, self._reached_ns)
            lane.waiting.append(job)
            lane.waiting_images += job.work.images
            lane.waiting_bytes += job.work.num_bytes
            self._call(math.ceil(job.work.images / lane.levels.batch))

    def _call(self, count: int) -> None:
        """Wake so many of the idle workers, or all."""
        for _ in range(min(count, self._idle)):
            self._idle -= 1
            self._calls.put(None)

    def _check_room(self, lane: Lane, num_bytes: int) -> None:
        if self._closed or lane.retired:
            raise RequestError(f"model {lane.name}: is being unloaded. Try again.", "unavailable")
        limits = self._limits
        full = len(lane.waiting) >= limits.queue
        # A request may be larger than the bound by itself; then it waits alone.
        if full or (lane.waiting and lane.waiting_bytes + num_bytes > limits.queue_bytes):
            wait_s = lane.waiting_images * (lane.image_ns or FIRST_GUESS_NS) / 1e9
            retry_s = max(1, math.ceil(wait_s / len(self._threads)))
            raise RequestError(
                f"model {lane.name}: its queue is full ({len(lane.waiting)} requests of "
                f"{lane.waiting_bytes >> 20} MiB wait). Try again in {retry_s} s.",
                "overloaded",
                retry_s,
            )

    def _drop(self, lane: Lane, job: Job) -> None:
        """Take back a job that nobody waits for; what is being computed of it is not used."""
        with self._lock:
            job.dropped = True
            if job in lane.waiting:
                self._leave_queue(lane, job)

    def _leave_queue(self, lane: Lane, job: Job) -> None:
        lane.waiting.remove(job)
        lane.waiting_images -= job.left
        lane.waiting_bytes -= job.work.num_bytes

    def _work(self) -> None:
        step_back()
        done: Done | None = None
        while True:
            with self._lock:
                gone = self._leave(done) if done else None
                batch = self._next()
                ended = batch is None and self._closed
                self._idle += batch is None and not ended
            # The last before this thread waits or computes: the event loop's wakes by it, and would
            # wake in vain while this one holds Python's lock.
            if done:
                done.answer()
            if gone:
                gone.close()
            # Frames keep what they last held, tensors among it, while the thread waits.
            done = gone = None
            if ended:
                return
            if batch is None:
                self._calls.get()
            else:
                done = self._compute(batch)
                del batch

    def _next(self) -> Batch | None:
        """Take the next images of the lane whose turn it is."""
        ready = [lane for lane in self._lanes if lane.takes_a_worker]
        if not ready:
            return None
        lane = min(ready, key=lambda lane: lane.spent_ns)
        self._reached_ns = lane.spent_ns
        parts = self._take(lane)
        lane.running += 1
        self._busy += 1
        at_work = self._busy + sum(len(other.waiting) for other in self._lanes)
        at_work += parts[-1].job.left  # of this request, others will be computed beside
        return Batch(lane, parts, lane.levels.runner(min(at_work, len(self._threads))))

    def _take(self, lane: Lane) -> list[Part]:
        parts: list[Part] = []
        room = lane.levels.batch
        now = time.perf_counter_ns()
        while room and lane.waiting:
            job = lane.waiting[0]
            count = min(room, job.left)
            if parts and count < job.left:  # it would only wait for its other half
                break
            if parts and job.work.size != parts[0].job.work.size:
                break
            if not job.taken:
                job.begun_at = now
            parts.append(Part(job, job.taken, count))
            job.taken += count
            lane.waiting_images -= count
            room -= count
            if not job.left:
                lane.waiting.popleft()
                lane.waiting_bytes -= job.work.num_bytes
        return parts

    def _compute(self, batch: Batch) -> "Done":
        """Run a batch; who has an answer by it waits for `Done.answer`."""
        lane, begin = batch.lane, time.perf_counter_ns()
        parts, pixels = _gather(batch.parts)
        ready = time.perf_counter_ns()
        if not parts:
            return Done(lane, (), {}, 0, (ready - begin, 0))
        outputs: Outputs | RequestError
        try:
            whole = pixels[0] if len(pixels) == 1 else np.concatenate(pixels)
            ready = time.perf_counter_ns()
            with lane.turn:
                outputs = batch.runner.run(whole)
        except Exception as error:
            outputs = _explained(lane, error)
        times_ns = (ready - begin, time.perf_counter_ns() - ready)
        return Done(lane, parts, outputs, sum(part.count for part in parts), times_ns)

    def _leave(self, done: "Done") -> Levels | None:
        """Count a batch, and return the runners that nobody will need any more."""
        done.divide()
        lane, spent_ns = done.lane, sum(done.times_ns)
        lane.running -= 1
        self._busy -= 1
        lane.spent_ns += spent_ns
        if done.images:
            image_ns = spent_ns // done.images
            lane.image_ns = (7 * lane.image_ns + image_ns) // 8 if lane.image_ns else image_ns
        return lane.levels if self._remove_if_done(lane) else None

    def _remove_if_done(self, lane: Lane) -> bool:
        if not (lane.retired and lane.idle and lane in self._lanes):
            return False
        self._lanes.remove(lane)
        return True


@dataclass
class Done:
    """A batch that was computed, or has failed; `times_ns` of decoding and of computing."""

    lane: Lane
    parts: Sequence[Part]
    outputs: Outputs | RequestError
    images: int
    times_ns: tuple[int, int]
    _complete: Sequence[Job] = ()
    _begin: int = field(default_factory=time.perf_counter_ns)

    def divide(self) -> None:
        """Give every job what is its own; under the batcher's lock."""
        outputs = self.outputs
        if isinstance(outputs, RequestError):
            self._complete = [part.job for part in self.parts]
            return
        complete, first = [], 0
        for part in self.parts:
            mine = outputs
            if len(self.parts) > 1:
                ends = slice(first, first + part.count)
                mine = {name: value[ends] for name, value in outputs.items()}
            first += part.count
            if part.job.add(part.start, part.count, mine, self.times_ns):
                complete.append(part.job)
        self._complete = complete

    def answer(self) -> None:
        """Settle the jobs that are complete, or have failed, and have the batch counted."""
        failed = self.outputs if isinstance(self.outputs, RequestError) else None
        answers = [(job, failed or job.outputs()) for job in self._complete]
        tell = None
        if self.images:
            # The event loop counts, once it has answered: until then this would be in its way.
            times_ns = (*self.times_ns, time.perf_counter_ns() - self._begin)
            tell = functools.partial(_tell_executed, self.lane, self.images, times_ns)
        for job, answer in answers[:-1]:
            job.settle(answer)
        if answers:
            job, answer = answers[-1]
            job.settle(answer, tell)
        elif self.parts:
            self.parts[0].job.settle(None, tell)


def _gather(parts: Sequence[Part]) -> tuple[list[Part], list[Pixels]]:
    """Return the parts that are still wanted and can be had, and the pixels of each."""
    kept, pixels = [], []
    for part in parts:
        if part.job.dropped:
            continue
        try:
            pixels.append(part.job.pixels(part.start, part.count))
            kept.append(part)
        except ImageError as error:
            part.job.settle(error)
        except Exception as error:
            _log.exception("an image could not be prepared")
            part.job.settle(RequestError(f"the image: {type(error).__name__}.", "internal"))
    return kept, pixels


def _explained(lane: Lane, error: Exception) -> RequestError:
    """Return what clients are told of a runtime that failed; the log gets the whole."""
    _log.error("model %s: %s", lane.name, error, exc_info=not isinstance(error, CoatDeployError))
    return RequestError(
        f"model {lane.name}: the runtime failed. The server's log says why.", "internal"
    )


def _tell_executed(lane: Lane, images: int, times_ns: tuple[int, int, int]) -> None:
    execution = Execution(images, *times_ns)
    for listener in lane.listeners:
        listener.executed(lane.name, execution)


def _tell_finished(lane: Lane, job: Job, kind: str | None, now: int) -> None:
    total = now - job.queued_at
    begun = job.begun_at - job.queued_at if job.begun_at else total
    rest = max(0, total - begun - job.input_ns - job.infer_ns) if job.begun_at else 0
    outcome = Outcome(job.work.images, kind, total, begun, job.input_ns, job.infer_ns, rest)
    for listener in lane.listeners:
        listener.finished(lane.name, outcome)
