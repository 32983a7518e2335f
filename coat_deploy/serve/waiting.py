"""Work that ends when nobody waits for it any more, or when it takes too long."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from coat_deploy.errors import RequestError

T = TypeVar("T")

PATIENCE_S = 0.05
"""How long work takes before it matters who waits for it; most has ended by then."""


class Interruption:
    """Called, it cancels what the task that made it awaits."""

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task, self._happened = task, False

    def __call__(self) -> None:
        """Cancel it."""
        self._happened = True
        self._task.cancel()

    def take_back(self) -> bool:
        """Return whether the task is cancelled by this, and let it go on if so."""
        if self._happened:
            self._task.uncancel()
        return self._happened


async def in_time(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Await work, not longer than so. Raises: TimeoutError.

    As `asyncio.timeout`, which costs a request that comes alone more (decision 14).
    """
    stop = Interruption()
    late = asyncio.get_running_loop().call_later(seconds, stop)
    try:
        return await work
    except asyncio.CancelledError:
        if not stop.take_back():
            raise
        raise TimeoutError from None
    finally:
        late.cancel()


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work; when the client goes meanwhile, cancel it.

    The request's body must have been read. Raises: RequestError for a client that is gone, and
    what the work raises.
    """
    stop = Interruption()
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass
        stop()

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    beginning = asyncio.get_running_loop().call_later(PATIENCE_S, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if not stop.take_back():
            raise
        raise RequestError("the client is gone.", "cancelled") from None
    finally:
        beginning.cancel()
        if watcher:
            watcher.cancel()
