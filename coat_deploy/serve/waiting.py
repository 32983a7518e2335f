"""Work that ends when nobody waits for it any more."""

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

from coat_deploy.errors import RequestError

T = TypeVar("T")


async def while_connected(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """Await work; when the client goes meanwhile, cancel it.

    The request's body must have been read. Raises: RequestError for a client that is gone, and
    what the work raises.
    """
    waiting = asyncio.current_task()
    assert waiting is not None
    gone = False

    async def watch() -> None:
        nonlocal gone
        while (await request.receive())["type"] != "http.disconnect":
            pass
        gone = True
        waiting.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await work
    except asyncio.CancelledError:
        if not gone:
            raise
        waiting.uncancel()
        raise RequestError("the client is gone.", "cancelled") from None
    finally:
        watcher.cancel()
