"""The gRPC server: where it listens, with what limits, and how it ends."""

import socket
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
from coat_deploy.serve.rpc.calls import Calls
from coat_deploy.serve.rpc.health import Health
from coat_deploy.serve.rpc.messages import HEALTH, PROTOCOL, REFLECTION
from coat_deploy.serve.rpc.protocol import Protocol
from coat_deploy.serve.rpc.reflection import Reflection

MAX_CALLS = 1024
"""Calls under way at once; more are refused before their message is read."""
KEEPALIVE_MS = 60_000
"""How often a silent client is asked whether it is still there."""
KEEPALIVE_TIMEOUT_MS = 20_000
"""How long it may take to answer."""
LEAST_PING_MS = 10_000
"""How often clients may ask the same."""


class GrpcServer:
    """A server that listens, on `port`."""

    def __init__(self, server: aio.Server, calls: Calls, port: int) -> None:
        self._server, self._calls, self.port = server, calls, port

    async def stop(self, grace_s: float) -> None:
        """Take no more calls, answer those that were taken, and end.

        Streams and watchers end at once, when what they sent is answered. What is not answered in
        time is cancelled.
        """
        self._calls.stopping.set()
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
    return GrpcServer(server, calls, port)


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
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    address = f"{host}:{listen.grpc_port}"
    if listen.workers == 1:
        _check_free(listen.host, listen.grpc_port or 0, address)
    try:
        if listen.certificate and listen.key:
            port = server.add_secure_port(address, _credentials(listen.certificate, listen.key))
        else:
            port = server.add_insecure_port(address)
    except RuntimeError as error:
        raise _cannot(address, str(error)) from error
    return int(port)


def _check_free(host: str, port: int, address: str) -> None:
    """Raise ServerError for an address that is taken; gRPC would write pages about it."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
    except OSError as error:
        raise _cannot(address, error.strerror or str(error)) from error


def _cannot(address: str, reason: str) -> ServerError:
    return ServerError(
        f"{address}: gRPC cannot listen there ({reason:.200}). Choose another with --grpc-port."
    )


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
