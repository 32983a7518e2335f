"""The standard health service: the server as a whole, and each model under its name."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2

from coat_deploy.errors import RequestError
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.rpc.calls import Answer, Call, StreamAnswer
from coat_deploy.serve.rpc.messages import PROTOCOL

LOOK_S = 0.5
"""How often a watched state is looked at."""

_State = health_pb2.HealthCheckResponse
_WHOLE = ("", PROTOCOL.full_name)


class Health:
    """Answers by a service. Watchers are sent away when `stopping` is set."""

    def __init__(self, service: InferenceService, stopping: asyncio.Event) -> None:
        self._service, self._stopping = service, stopping

    def answers(self) -> dict[str, Answer]:
        """Return what answers the methods with one message."""
        return {"Check": self.check, "List": self.list}

    def streams(self) -> dict[str, StreamAnswer]:
        """Return what answers the methods with streams."""
        return {"Watch": self.watch}

    async def check(self, content: bytes, call: Call) -> bytes:
        """Tell the state of the server or of a model."""
        name = _name(content)
        state = self._state(name)
        if state == _State.SERVICE_UNKNOWN:
            raise RequestError(f"'{name:.100}': is no model that is served.", "not_found")
        return bytes(_State(status=state).SerializeToString())

    async def list(self, content: bytes, call: Call) -> bytes:
        """Tell all states."""
        names = [card["name"] for card in self._service.cards()]
        states = {name: _State(status=self._state(name)) for name in (*_WHOLE, *names)}
        return bytes(health_pb2.HealthListResponse(statuses=states).SerializeToString())

    async def watch(self, contents: AsyncIterator[bytes], call: Call) -> AsyncIterator[bytes]:
        """Tell a state, and again whenever it changes."""
        name = _name(await anext(contents, b""))
        told = None
        while not self._stopping.is_set():
            if (state := self._state(name)) != told:
                told = state
                yield _State(status=state).SerializeToString()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._stopping.wait()
        if told != _State.NOT_SERVING:
            yield _State(status=_State.NOT_SERVING).SerializeToString()

    def _state(self, name: str) -> Any:
        if name in _WHOLE:
            ready = self._service.ready
        else:
            try:
                ready = self._service.model_ready(name) and not self._service.draining
            except RequestError:
                return _State.SERVICE_UNKNOWN
        return _State.SERVING if ready else _State.NOT_SERVING


def _name(content: bytes) -> str:
    try:
        return str(health_pb2.HealthCheckRequest.FromString(content).service)
    except DecodeError as error:
        raise RequestError(f"the message is not a HealthCheckRequest ({error!s:.100}).") from error
