"""The gRPC server: where it listens, with what limits, and how it ends."""

import asyncio
import ssl
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from coat_deploy.errors import ServerError
from coat_deploy.serve.access_log import AccessLog
from coat_deploy.serve.auth import Door
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.metrics import Metrics
from coat_deploy.serve.options import Limits, ListenOptions
from coat_deploy.serve.rpc.address import address, cannot_listen, check_free
from coat_deploy.serve.rpc.calls import Calls
from coat_deploy.serve.rpc.health import Health
from coat_deploy.serve.rpc.messages import HEALTH, PROTOCOL, REFLECTION
from coat_deploy.serve.rpc.protocol import Protocol
from coat_deploy.serve.rpc.reflection import Reflection
from coat_deploy.serve.tracing import grpc_interceptors

MAX_CALLS = 1024
"""Calls under way at once; more are refused before their message is read."""
KEEPALIVE_MS = 60_000
"""How often a silent client is asked whether it is still there."""
KEEPALIVE_TIMEOUT_MS = 20_000
"""How long it may take to answer."""
LEAST_PING_MS = 10_000
"""How often clients may ask the same."""
LINGER_S = 0.25
"""How long calls that come when the end has begun are told to go elsewhere."""


class GrpcServer:
    """A server that listens, at `address`."""

    def __init__(self, server: aio.Server, calls: Calls, address: str) -> None:
        self._server, self._calls, self.address = server, calls, address

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, answer those that were taken, and end.

        Streams and watchers end at once, when what they sent is answered. What is not answered in
        time is cancelled; another call may shorten the time.
        """
        self._calls.stopping.set()
        # gRPC cuts off what has come and is not begun yet; so that is refused first, by a status.
        await asyncio.sleep(min(LINGER_S, grace_s))
        await self._server.stop(grace_s)


async def start_grpc(
    service: InferenceService,
    listen: ListenOptions,
    metrics: Metrics | None = None,
    log: AccessLog | None = None,
) -> GrpcServer:
    """Serve a service over gRPC, in the running event loop, which HTTP may share.

    Raises: ServerError when it cannot listen.
    """
    assert listen.grpc_port is not None
    calls = Calls(Door(listen.token), service.limits, metrics, log)
    server = aio.server(
        interceptors=grpc_interceptors(),
        options=_options(service.limits, share_port=listen.workers > 1),
        maximum_concurrent_rpcs=MAX_CALLS,
    )
    protocol, health = Protocol(service), Health(service, calls.stopping)
    server.add_generic_rpc_handlers(
        (
            calls.handlers(PROTOCOL, protocol.answers(), protocol.streams()),
            calls.handlers(HEALTH, health.answers(), health.streams()),
            calls.handlers(REFLECTION, {}, Reflection().streams()),
        )
    )
    port = _listen(server, listen)
    await server.start()
    return GrpcServer(server, calls, address(listen, port))


def _options(limits: Limits, share_port: bool) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", limits.body_bytes),
        ("grpc.so_reuseport", int(share_port)),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", LEAST_PING_MS),
    ]


def _listen(server: aio.Server, listen: ListenOptions) -> int:
    if listen.workers == 1:  # else the other processes are there, too
        check_free(listen)
    try:
        if listen.certificate and listen.key:
            pair = _credentials(listen.certificate, listen.key)
            return int(server.add_secure_port(address(listen), pair))
        return int(server.add_insecure_port(address(listen)))
    except RuntimeError as error:
        raise cannot_listen(listen, str(error)) from error


def _credentials(certificate: Path, key: Path) -> grpc.ServerCredentials:
    try:
        # gRPC tells what is wrong with them only when the first client comes.
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certificate, key)
        pair = (key.read_bytes(), certificate.read_bytes())
    except (OSError, ssl.SSLError) as error:
        raise ServerError(
            f"{certificate}, {key}: not a certificate and its key ({error.strerror or error})."
        ) from error
    return grpc.ssl_server_credentials((pair,))
