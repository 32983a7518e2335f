"""What every call passes, and what is noted of it.

request id > token > message > answer or error > metrics, access log
"""

import asyncio
import logging
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.descriptor import ServiceDescriptor

from coat_deploy.errors import RequestError
from coat_deploy.serve.access_log import AccessLog
from coat_deploy.serve.auth import Door
from coat_deploy.serve.body import Receiving
from coat_deploy.serve.metrics import Metrics
from coat_deploy.serve.options import Limits
from coat_deploy.serve.rpc.status import CODES, retry_metadata

_log = logging.getLogger(__name__)

OPEN = frozenset(
    f"/{name}"
    for name in (
        "inference.GRPCInferenceService/ServerLive",
        "inference.GRPCInferenceService/ServerReady",
        "grpc.health.v1.Health/Check",
        "grpc.health.v1.Health/Watch",
    )
)
"""Methods that need no token: for who looks whether the server is well."""

REQUEST_ID = "x-request-id"
_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")

Answer = Callable[[bytes, "Call"], Awaitable[bytes]]
StreamAnswer = Callable[[AsyncIterator[bytes], "Call"], AsyncIterator[bytes]]


@dataclass
class Call:
    """A call under way. `deadline`: until when its caller waits, of `time.monotonic`."""

    request_id: str
    deadline: float | None
    receiving: Receiving
    status: str = CODES["cancelled"].name
    bytes_in: int = 0
    bytes_out: int = 0


class Calls:
    """Makes the handlers of methods. `stopping` is set when no call is to go on without need."""

    def __init__(
        self, door: Door, limits: Limits, metrics: Metrics | None, log: AccessLog | None
    ) -> None:
        self._door, self._limits, self._metrics, self._log = door, limits, metrics, log
        self._receiving = Receiving(limits)
        self.stopping = asyncio.Event()

    def handlers(
        self,
        service: ServiceDescriptor,
        answers: Mapping[str, Answer],
        streams: Mapping[str, StreamAnswer],
    ) -> grpc.GenericRpcHandler:
        """Return the handlers of a service's methods, by name.

        They take and give bytes. On the wire a call with one message is a stream of one: as a
        stream it is read here, when there is room and for as long as there is time.
        """
        found = {}
        for name, answer in answers.items():
            handle = self._unary(f"/{service.full_name}/{name}", answer)
            found[name] = grpc.stream_unary_rpc_method_handler(handle)
        for name, stream in streams.items():
            handle = self._stream(f"/{service.full_name}/{name}", stream)
            found[name] = grpc.stream_stream_rpc_method_handler(handle)
        return grpc.method_handlers_generic_handler(service.full_name, found)

    def _unary(self, path: str, answer: Answer) -> Callable[..., Any]:
        async def handle(contents: AsyncIterator[bytes], context: Any) -> bytes:
            with self._noted(path, context) as call:
                try:
                    self._admit(path, context)
                    with self._receiving.share() as share:
                        content = await self._first(contents)
                        call.bytes_in = len(content)
                        share.add(len(content))
                        reply = await answer(content, call)
                except Exception as error:
                    refusal = self._refusal(path, call, error)
                else:
                    call.status, call.bytes_out = grpc.StatusCode.OK.name, len(reply)
                    context.set_trailing_metadata(((REQUEST_ID, call.request_id),))
                    return reply
                await _abort(context, call, refusal)
                raise AssertionError("gRPC ends the call")

        return handle

    def _stream(self, path: str, answer: StreamAnswer) -> Callable[..., Any]:
        async def handle(contents: AsyncIterator[bytes], context: Any) -> AsyncIterator[bytes]:
            with self._noted(path, context) as call:
                refusal = None
                try:
                    self._admit(path, context)
                    async for reply in answer(self._until_stopping(contents, call), call):
                        call.bytes_out += len(reply)
                        yield reply
                except Exception as error:
                    refusal = self._refusal(path, call, error)
                if refusal is None and self.stopping.is_set():
                    refusal = _ending()
                if refusal is not None:
                    await _abort(context, call, refusal)
                call.status = grpc.StatusCode.OK.name

        return handle

    def _admit(self, path: str, context: Any) -> None:
        if path in OPEN:
            return
        self._door.check(_metadata(context, "authorization"))
        if self.stopping.is_set():
            raise _ending()

    async def _first(self, contents: AsyncIterator[bytes]) -> bytes:
        """Return the one message of a call that has one."""
        try:
            async with asyncio.timeout(self._limits.deadline_s):
                async for content in contents:
                    return content
        except TimeoutError:
            raise RequestError(
                f"the message did not come in {self._limits.deadline_s:g} s. Send it faster.",
                "slow",
            ) from None
        raise RequestError("the call came without a message of a size that is taken.")

    async def _until_stopping(
        self, contents: AsyncIterator[bytes], call: Call
    ) -> AsyncIterator[bytes]:
        """Return the messages that come until the client or the server ends."""
        stopping = asyncio.ensure_future(self.stopping.wait())
        try:
            while not self.stopping.is_set():
                coming = asyncio.ensure_future(anext(contents, None))
                try:
                    await asyncio.wait((coming, stopping), return_when=asyncio.FIRST_COMPLETED)
                    content = coming.result() if coming.done() else None
                finally:
                    coming.cancel()
                if content is None:
                    return
                call.bytes_in += len(content)
                yield content
        finally:
            stopping.cancel()

    def _refusal(self, path: str, call: Call, error: Exception) -> RequestError:
        if isinstance(error, RequestError):
            return error
        _log.error("%s failed", path, exc_info=error)  # ours; the client is told no more than that
        return RequestError("the server failed. Its log says why.", "internal")

    @contextmanager
    def _noted(self, path: str, context: Any) -> Iterator[Call]:
        begin = time.perf_counter_ns()
        shown, left_s = _metadata(context, REQUEST_ID), context.time_remaining()
        call = Call(
            shown if shown and _ID.fullmatch(shown) else uuid.uuid4().hex,
            None if left_s is None else time.monotonic() + left_s,
            self._receiving,
        )
        ended = self._metrics.begun_call() if self._metrics else None
        try:
            yield call
        finally:
            if ended:
                ended(call.status)
            if self._log:
                self._log.add(
                    request_id=call.request_id,
                    client=_host(context.peer()),
                    method="gRPC",
                    path=path,
                    status=call.status,
                    ms=round((time.perf_counter_ns() - begin) / 1e6, 3),
                    bytes_in=call.bytes_in,
                    bytes_out=call.bytes_out,
                )


def _ending() -> RequestError:
    return RequestError("the server ends. Ask another.", "unavailable", 1)


async def _abort(context: Any, call: Call, error: RequestError) -> None:
    """End a call with an error; raises what gRPC ends calls by."""
    code = CODES[error.kind]
    call.status = code.name
    trailing = ((REQUEST_ID, call.request_id), *retry_metadata(error))
    await context.abort(code, str(error), trailing)


def _metadata(context: Any, key: str) -> str | None:
    for name, value in context.invocation_metadata() or ():
        if name == key:
            return value if isinstance(value, str) else None
    return None


def _host(peer: str) -> str:
    """Return the address of a peer.

    >>> _host("ipv4:127.0.0.1:4711"), _host("ipv6:%5B::1%5D:4711")
    ('127.0.0.1', '::1')
    """
    _, _, rest = peer.partition(":")
    host, _, _ = rest.rpartition(":")
    return host.removeprefix("%5B").removesuffix("%5D").strip("[]")
