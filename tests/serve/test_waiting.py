"""Work ends when its time is over or its client is gone; other cancellations stay what they are."""

import asyncio

import pytest

from coat_deploy.errors import RequestError
from coat_deploy.serve.waiting import PATIENCE_S, in_time, while_connected

LONG_S = 30.0


class Client:
    """What is waited for on behalf of a client: it goes when told."""

    def __init__(self):
        self.gone = asyncio.Event()

    async def receive(self):
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def forever(ended):
    try:
        await asyncio.sleep(LONG_S)
    finally:
        ended.append(True)


def test_work_that_ends_in_time_returns():
    async def main():
        return await in_time(LONG_S, asyncio.sleep(0, "done"))

    assert asyncio.run(main()) == "done"


def test_work_that_takes_too_long_is_ended_and_the_task_goes_on():
    ended = []

    async def main():
        with pytest.raises(TimeoutError):
            await in_time(0.01, forever(ended))
        await asyncio.sleep(0)
        return asyncio.current_task().cancelling()

    assert asyncio.run(main()) == 0 and ended == [True]


def test_an_error_of_the_work_is_passed_on():
    async def fails():
        raise ValueError("of the work")

    async def main():
        await in_time(LONG_S, fails())

    with pytest.raises(ValueError, match="of the work"):
        asyncio.run(main())


@pytest.mark.parametrize("kind", ["in_time", "while_connected"])
def test_a_cancellation_from_outside_stays_one(kind):
    ended = []

    async def main():
        work = forever(ended)
        waiting = in_time(LONG_S, work) if kind == "in_time" else while_connected(Client(), work)
        task = asyncio.create_task(waiting)
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert ended == [True]


@pytest.mark.parametrize("after_s", [0.0, 2 * PATIENCE_S])
def test_a_client_that_goes_ends_the_work(after_s):
    ended = []

    async def main():
        client = Client()
        asyncio.get_running_loop().call_later(after_s, client.gone.set)
        with pytest.raises(RequestError, match="the client is gone") as raised:
            await while_connected(client, forever(ended))
        assert raised.value.kind == "cancelled"
        return asyncio.current_task().cancelling()

    assert asyncio.run(main()) == 0 and ended == [True]


def test_nothing_watches_when_the_work_has_ended():
    async def main():
        assert await while_connected(Client(), asyncio.sleep(2 * PATIENCE_S, "done")) == "done"
        await asyncio.sleep(0)
        return len(asyncio.all_tasks())

    assert asyncio.run(main()) == 1
