"""A gRPC server in a thread of this process, beside the client's own messages."""

import asyncio
import threading
from collections.abc import Callable, Iterator

import grpc
import pytest
import tritonclient.grpc

from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.options import ListenOptions
from coat_deploy.serve.rpc.server import GrpcServer, start_grpc

WAIT_S = 30
"""Longest that anything is waited for."""


class Running:
    """A service that listens; `run` runs something in its event loop."""

    def __init__(self, service: InferenceService, listen: ListenOptions, **how: object) -> None:
        self.service, self.listen = service, listen
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self.server: GrpcServer = self.run(start_grpc(service, listen, **how))
        self.address = self.server.address

    def begin(self, coroutine):
        """Run in the loop; return its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine):
        return self.begin(coroutine).result(WAIT_S)

    def close(self) -> None:
        self.run(self.server.stop(0))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        self._loop.close()


@pytest.fixture
def listening(serving) -> Iterator[Callable[..., Running]]:
    """Serve over gRPC: `listen` are fields of ListenOptions, `how` what start_grpc takes,
    other keywords fields of ServeOptions."""
    running: list[Running] = []

    def start(listen=None, how=None, **options: object) -> Running:
        where = ListenOptions(**{"grpc_port": 0, **(listen or {})})
        running.append(Running(serving(**options), where, **(how or {})))
        return running[-1]

    yield start
    for each in running:
        each.close()


@pytest.fixture
def client(listening) -> Iterator[tritonclient.grpc.InferenceServerClient]:
    """Triton's client of a server with the defaults."""
    with tritonclient.grpc.InferenceServerClient(listening().address) as found:
        yield found


@pytest.fixture
def calling() -> Iterator[Callable[..., bytes]]:
    """Call a method with bytes: address, path, content, and what the call takes."""
    channels: list[grpc.Channel] = []

    def call(address: str, path: str, content: bytes = b"", **how: object) -> bytes:
        channels.append(grpc.insecure_channel(address))
        return channels[-1].unary_unary(path)(content, **{"timeout": WAIT_S, **how})

    yield call
    for channel in channels:
        channel.close()
