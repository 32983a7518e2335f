"""The application over HTTP: who may come in, which route answers, what is noted of it.

request id > token > route > answer or error > metrics, access log
"""

import logging
import os
import re
import time
from collections.abc import Awaitable, Callable

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route, Router
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coat_deploy.errors import RequestError
from coat_deploy.serve import openapi, page
from coat_deploy.serve.access_log import AccessLog
from coat_deploy.serve.auth import Door
from coat_deploy.serve.body import Receiving
from coat_deploy.serve.image_routes import ImageRoutes
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.metrics import CONTENT_TYPE, Metrics
from coat_deploy.serve.protocol_routes import ProtocolRoutes
from coat_deploy.serve.replies import STATUS, error_reply, json_reply
from coat_deploy.serve.tracing import traced

_log = logging.getLogger(__name__)

OPEN = ("/v2/health/live", "/v2/health/ready", "/", openapi.PATH)
"""Paths that need no token: for who looks whether the server is well, and what holds no data."""

REQUEST_ID = b"x-request-id"
_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")
_PLAIN = {404: "no such route here. The routes are those of /v2 and POST /models/MODEL."}

Answer = Callable[[Request], Awaitable[Response]]


def build_app(
    service: InferenceService,
    metrics: Metrics,
    token: str | None = None,
    log: AccessLog | None = None,
) -> ASGIApp:
    """Return the application that serves a service over HTTP."""
    guarded = [
        Route(route.path, _Answering(route.endpoint), methods=route.methods)
        for route in all_routes(service, metrics)
    ]
    # Starlette's own layers around a router would only repeat what ours do.
    router = Router(guarded, redirect_slashes=False)
    return traced(Front(router, service, Door(token), metrics, log))


def all_routes(service: InferenceService, metrics: Metrics) -> list[Route]:
    """Return every route that is answered; `openapi.py` describes each."""
    receiving = Receiving(service.limits)

    async def show_metrics(request: Request) -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    return [
        *ImageRoutes(service, receiving).routes(),
        *ProtocolRoutes(service, receiving).routes(),
        *page.routes(),
        *openapi.routes(),
        Route("/metrics", show_metrics, methods=["GET"]),
    ]


class _Answering:
    """A route as an application: its answer, or the error that it raises."""

    def __init__(self, answer: Answer) -> None:
        self._answer = answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive, send)
        try:
            reply = await self._answer(request)
        except RequestError as error:
            reply = error_reply(error)
        except Exception:  # ours; the client is told no more than that
            _log.exception("%s %s failed", scope["method"], scope["path"])
            reply = error_reply(RequestError("the server failed. Its log says why.", "internal"))
        await reply(scope, receive, send)


def _plain_error(scope: Scope, error: HTTPException) -> Response:
    message = _PLAIN.get(error.status_code, f"{scope['method']}: {error.detail} for this route.")
    reply = json_reply({"error": message}, error.status_code)
    reply.headers.update(error.headers or {})
    return reply


class Front:
    """What every request passes: its id, the token, and what is noted when it is answered."""

    def __init__(
        self,
        app: ASGIApp,
        service: InferenceService,
        door: Door,
        metrics: Metrics,
        log: AccessLog | None,
    ) -> None:
        self._app, self._service, self._door = app, service, door
        self._metrics, self._log = metrics, log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        if scope["type"] != "http":  # nothing else is spoken
            return
        begin = time.perf_counter_ns()
        headers = dict(scope["headers"])
        request_id = _request_id(headers.get(REQUEST_ID))
        status, sent = STATUS["cancelled"], 0
        ended = self._metrics.begun()

        async def note(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(REQUEST_ID, request_id)]
                if self._service.draining:
                    extra.append((b"connection", b"close"))
                message = {**message, "headers": [*message["headers"], *extra]}
            else:
                sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._admit(scope, headers, receive, note)
        finally:
            ended(status)
            if self._log:
                self._log.add(
                    request_id=request_id.decode(),
                    client=scope["client"][0] if scope.get("client") else None,
                    method=scope["method"],
                    path=scope["path"],
                    status=status,
                    ms=round((time.perf_counter_ns() - begin) / 1e6, 3),
                    bytes_in=int(headers.get(b"content-length") or 0),
                    bytes_out=sent,
                )

    async def _admit(
        self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send
    ) -> None:
        try:
            if scope["path"] not in OPEN:
                shown = headers.get(b"authorization")
                self._door.check(shown.decode("latin-1") if shown else None)
        except RequestError as error:
            await error_reply(error)(scope, receive, send)
            return
        scope["app"] = self._app  # then a router raises what it does not find
        try:
            await self._app(scope, receive, send)
        except HTTPException as error:
            await _plain_error(scope, error)(scope, receive, send)


def _request_id(shown: bytes | None) -> bytes:
    """Return the id that the client gave, or one of our own."""
    if shown is not None and _ID.fullmatch(shown):
        return shown
    return os.urandom(16).hex().encode()
