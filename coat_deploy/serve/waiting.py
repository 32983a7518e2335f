"""Work that ends when nobody waits for it any more."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from coat_deploy.errors import RequestError

T = TypeVar("T")

PATIENCE_S = 0.05
"""How long work takes before it matters who waits for it; most has ended by then."""


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work; when the client goes meanwhile, cancel it.

    The request's body must have been read. Raises: RequestError for a client that is gone, and
    what the work raises.
    """
    waiting = asyncio.current_task()
    assert waiting is not None
    gone = False
    watcher: asyncio.Task[None] | None = None

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        waiting.cancel()

    def begin() -> None:
        nonlocal watcher
        watcher = asyncio.create_task(watch())

    beginning = asyncio.get_running_loop().call_later(PATIENCE_S, begin)
    try:
        return await work
    except asyncio.CancelledError:
        if not gone:
            raise
        waiting.uncancel()
        raise RequestError("the client is gone.", "cancelled") from None
    finally:
        beginning.cancel()
        if watcher:
            watcher.cancel()
