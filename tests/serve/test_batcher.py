import asyncio
import threading
import time

import numpy as np
import pytest

from coat_deploy.errors import ImageError, RequestError, RunnerError
from coat_deploy.runner import Closing, TensorSpec
from coat_deploy.serve.batcher import Batcher, Lane
from coat_deploy.serve.jobs import Work
from coat_deploy.serve.levels import Level, Levels
from coat_deploy.serve.options import Limits

PATIENCE_S = 10


class Gated(Closing):
    """Returns the mean of each image; with a gate, waits for it, and tells that it does."""

    target = "gated"
    inputs = (TensorSpec("pixels", "float32", ("B", 3, 2, 2)),)
    outputs = (TensorSpec("logits", "float32", ("B", 1)),)

    def __init__(self, gate=None, fail=None):
        self.gate, self.fail = gate, fail
        self.entered = threading.Semaphore(0)
        self.batches, self.closed = [], False

    def run(self, pixels):
        self.batches.append(len(pixels))
        self.entered.release()
        if self.gate is not None:
            assert self.gate.wait(PATIENCE_S)
        if self.fail:
            raise self.fail
        return {"logits": pixels.reshape(len(pixels), -1).mean(axis=1, keepdims=True)}

    def close(self):
        self.closed = True


class Told:
    def __init__(self):
        self.executions, self.outcomes = [], []

    def executed(self, model, execution):
        self.executions.append((model, execution.images))

    def finished(self, model, outcome):
        self.outcomes.append(outcome.kind)


def images(*values):
    return np.stack([np.full((3, 2, 2), value, np.float32) for value in values])


def work(*values):
    pixels = images(*values)
    return Work(pixels, pixels.nbytes, (2, 2))


def lane(runner, name="toy", streams=1, batch=1, listeners=()):
    return Lane(name, Levels([Level(streams, runner)], batch), listeners)


@pytest.fixture
def start():
    """Make a batcher of lanes; it is closed at the end."""
    made = []

    def build(*lanes, workers=1, **limits):
        batcher = Batcher(workers, Limits(**limits))
        made.append(batcher)
        for each in lanes:
            batcher.add(each)
        return batcher

    yield build
    for batcher in made:
        batcher.close()


async def entered(runner):
    assert await asyncio.to_thread(runner.entered.acquire, timeout=PATIENCE_S)


def later(seconds=PATIENCE_S):
    return time.monotonic() + seconds


def kind_of(future):
    return type(future.exception()).__name__, getattr(future.exception(), "kind", None)


def test_images_are_answered_each_by_its_own_outputs(start):
    mine = lane(Gated(), streams=3)
    batcher = start(mine, workers=3)

    async def main():
        jobs = [batcher.run(mine, work(i, i + 0.5), later()) for i in range(20)]
        return await asyncio.gather(*jobs)

    for i, outputs in enumerate(asyncio.run(main())):
        assert outputs["logits"].ravel().tolist() == [i, i + 0.5]


def test_what_waits_is_one_batch_when_a_worker_is_idle_again(start):
    gate = threading.Event()
    runner = Gated(gate)
    mine = lane(runner, batch=8)
    batcher = start(mine)

    async def main():
        first = asyncio.create_task(batcher.run(mine, work(0), later()))
        await entered(runner)
        rest = [asyncio.create_task(batcher.run(mine, work(i, i), later())) for i in range(1, 6)]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(first, *rest)

    answers = asyncio.run(main())
    assert runner.batches == [1, 8, 2]
    assert [float(answer["logits"][-1, 0]) for answer in answers] == [0, 1, 2, 3, 4, 5]


def test_images_of_another_size_are_another_batch(start):
    gate = threading.Event()
    runner = Gated(gate)
    mine = lane(runner, batch=8)
    batcher = start(mine)

    def sized(value, side):
        pixels = np.full((1, 3, side, side), value, np.float32)
        return Work(pixels, pixels.nbytes, (side, side))

    async def main():
        first = asyncio.create_task(batcher.run(mine, work(0), later()))
        await entered(runner)
        sides = [2, 2, 4, 4, 4, 2]
        rest = [
            asyncio.create_task(batcher.run(mine, sized(i, side), later()))
            for i, side in enumerate(sides, 1)
        ]
        await asyncio.sleep(0)
        gate.set()
        return await asyncio.gather(first, *rest)

    answers = asyncio.run(main())
    assert runner.batches == [1, 2, 3, 1]
    assert [float(answer["logits"][0, 0]) for answer in answers] == list(range(7))


def test_a_request_alone_gets_all_threads_and_several_get_one_each(start):
    gate = threading.Event()
    alone, together = Gated(gate), Gated(gate)
    mine = Lane("toy", Levels([Level(1, alone), Level(2, together)], 1), ())
    batcher = start(mine, workers=2)

    async def main():
        first = asyncio.create_task(batcher.run(mine, work(1), later()))
        await entered(alone)
        second = asyncio.create_task(batcher.run(mine, work(2), later()))
        await entered(together)
        gate.set()
        await asyncio.gather(first, second)

    asyncio.run(main())
    assert (alone.batches, together.batches) == ([1], [1])


def test_a_full_queue_refuses_at_once_and_says_when_to_come_again(start):
    gate = threading.Event()
    runner = Gated(gate)
    mine = lane(runner)
    batcher = start(mine, queue=2)

    async def main():
        jobs = [asyncio.create_task(batcher.run(mine, work(0), later()))]
        await entered(runner)
        jobs += [asyncio.create_task(batcher.run(mine, work(i), later())) for i in (1, 2)]
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="queue is full") as refused:
            await batcher.run(mine, work(3), later())
        assert refused.value.kind == "overloaded" and refused.value.retry_after_s >= 1
        with pytest.raises(RequestError, match="queue is full"):
            batcher.check_room(mine)
        gate.set()
        assert len(await asyncio.gather(*jobs)) == 3
        batcher.check_room(mine)

    asyncio.run(main())


def test_a_queue_is_bounded_by_bytes_too(start):
    gate = threading.Event()
    runner = Gated(gate)
    mine = lane(runner)
    batcher = start(mine, queue_bytes=100)

    async def main():
        jobs = [asyncio.create_task(batcher.run(mine, work(0), later()))]
        await entered(runner)
        jobs.append(asyncio.create_task(batcher.run(mine, work(1, 1, 1), later())))
        await asyncio.sleep(0)
        with pytest.raises(RequestError, match="queue is full"):
            await batcher.run(mine, work(2), later())
        gate.set()
        await asyncio.gather(*jobs)

    asyncio.run(main())


def test_what_is_late_is_told_so_and_not_computed(start):
    gate = threading.Event()
    runner, told = Gated(gate), Told()
    mine = lane(runner, listeners=[told])
    batcher = start(mine)

    async def main():
        first = asyncio.create_task(batcher.run(mine, work(0), later()))
        await entered(runner)
        with pytest.raises(RequestError, match="not computed in time") as late:
            await batcher.run(mine, work(1), later(0.01))
        assert late.value.kind == "deadline"
        gate.set()
        await first

    asyncio.run(main())
    assert runner.batches == [1]
    assert told.outcomes == ["deadline", None]


def test_a_client_that_is_gone_costs_no_computing(start):
    gate = threading.Event()
    runner, told = Gated(gate), Told()
    mine = lane(runner, listeners=[told])
    batcher = start(mine)

    async def main():
        first = asyncio.create_task(batcher.run(mine, work(0), later()))
        await entered(runner)
        gone = asyncio.create_task(batcher.run(mine, work(1), later()))
        await asyncio.sleep(0)
        gone.cancel()
        with pytest.raises(asyncio.CancelledError):
            await gone
        assert batcher.pending == 1
        gate.set()
        await first

    asyncio.run(main())
    assert runner.batches == [1]
    assert told.outcomes == ["cancelled", None]


def test_a_model_that_is_asked_much_does_not_keep_another_waiting(start):
    order = []

    class Noting(Gated):
        def run(self, pixels):
            order.append(self.fail)
            time.sleep(0.002)
            return {"logits": pixels[:, 0, 0, :1]}

    gate = threading.Event()
    held = Gated(gate)
    blocker, busy, calm = lane(held), lane(Noting(fail="busy")), lane(Noting(fail="calm"))
    batcher = start(blocker, busy, calm)

    async def main():
        jobs = [asyncio.create_task(batcher.run(blocker, work(0), later()))]
        await entered(held)
        jobs += [asyncio.create_task(batcher.run(busy, work(i), later())) for i in range(20)]
        await asyncio.sleep(0)
        jobs += [asyncio.create_task(batcher.run(calm, work(i), later())) for i in range(3)]
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(*jobs)

    asyncio.run(main())
    assert order.count("busy") == 20
    assert [i for i, name in enumerate(order) if name == "calm"][-1] < 10


def test_a_broken_image_spoils_no_other(start):
    gate = threading.Event()
    runner = Gated(gate)
    mine = lane(runner, batch=4)
    batcher = start(mine)

    def broken():
        raise ImageError("image: broken. Mend it.")

    async def main():
        first = asyncio.create_task(batcher.run(mine, work(0), later()))
        await entered(runner)
        bad = asyncio.create_task(batcher.run(mine, Work([broken], 1, (2, 2)), later()))
        good = asyncio.create_task(
            batcher.run(
                mine, Work([lambda: images(7)[0], lambda: images(8)[0]], 1, (2, 2)), later()
            )
        )
        await asyncio.sleep(0)
        gate.set()
        await asyncio.wait([first, bad, good])
        return bad, good

    bad, good = asyncio.run(main())
    assert kind_of(bad) == ("ImageError", None)
    assert good.result()["logits"].ravel().tolist() == [7, 8]


def test_a_runtime_that_fails_is_not_the_clients_fault_and_tells_nothing(start, caplog):
    mine = lane(Gated(fail=RunnerError("secret path")))
    batcher = start(mine)
    with pytest.raises(RequestError) as failed:
        asyncio.run(batcher.run(mine, work(1), later()))
    assert failed.value.kind == "internal" and "secret" not in str(failed.value)
    assert "secret path" in caplog.text


def test_a_retired_lane_computes_what_waits_and_is_then_closed(start):
    gate = threading.Event()
    runner = Gated(gate)
    mine = lane(runner)
    batcher = start(mine)

    async def main():
        jobs = [asyncio.create_task(batcher.run(mine, work(0), later()))]
        await entered(runner)
        jobs.append(asyncio.create_task(batcher.run(mine, work(1), later())))
        await asyncio.sleep(0)
        batcher.retire(mine)
        with pytest.raises(RequestError, match="unloaded"):
            await batcher.run(mine, work(2), later())
        assert not runner.closed
        gate.set()
        await asyncio.gather(*jobs)

    asyncio.run(main())
    batcher.close()
    assert runner.closed and runner.batches == [1, 1]


def test_closing_answers_what_waits(start):
    gate = threading.Event()
    runner = Gated(gate)
    mine = lane(runner)
    batcher = start(mine)

    async def main():
        first = asyncio.create_task(batcher.run(mine, work(0), later()))
        await entered(runner)
        second = asyncio.create_task(batcher.run(mine, work(1), later()))
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(batcher.close))
        await asyncio.wait([second])
        gate.set()
        await closing
        return await first, second

    first, second = asyncio.run(main())
    assert float(first["logits"][0, 0]) == 0
    assert kind_of(second) == ("RequestError", "unavailable")
    assert runner.closed


def test_what_was_done_is_told(start):
    told = Told()
    mine = lane(Gated(), batch=8, listeners=[told])
    batcher = start(mine)
    asyncio.run(batcher.run(mine, work(1, 2, 3), later()))
    batcher.close()
    assert told.executions == [("toy", 3)]
    assert told.outcomes == [None]
