"""A server process: sockets, the event loop, signals, and an end that owes no answer.

bind > load the models > serve > signal > not ready > no new connections > last answers > end
"""

import asyncio
import contextlib
import logging
import signal
import socket
import ssl
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import uvicorn

from coat_deploy.errors import ServerError
from coat_deploy.serve.access_log import AccessLog
from coat_deploy.serve.connection import connections
from coat_deploy.serve.http import build_app
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.listener import emptied, turn_away
from coat_deploy.serve.metrics import Metrics
from coat_deploy.serve.options import ListenOptions, ServeOptions

if TYPE_CHECKING:
    from coat_deploy.serve.rpc.server import GrpcServer

_log = logging.getLogger(__name__)

BACKLOG = 1024
KEEP_ALIVE_S = 75
LINGER_S = 0.2
"""How long connections and requests that were on their way when the end began are waited for."""
HANDSHAKE_S = 0.02
"""How long connections that have begun are given to come: one way and back. Who tries to begin one
meanwhile is refused a second later, so it is short."""
FIRST_WORD_S = 2.0
"""How long a connection that has just been made is given to say what it was made for."""

SWITCH_S = 0.0005
"""How long a thread at work in Python keeps the event loop waiting; Python's own is 5 ms."""
SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME_SIGNAL_S = 1.0
"""A signal so soon after another is the same one, sent to a process and to its group."""

Tell = Callable[[str], None]


def check_certificate(listen: ListenOptions) -> None:
    """Raise ServerError for a certificate and key that cannot be used, before anything starts."""
    if listen.certificate is None and listen.key is None:
        return
    if listen.certificate is None or listen.key is None:
        raise ServerError(
            "TLS: needs both a certificate and its key. Give --tls-cert and --tls-key."
        )
    for path in (listen.certificate, listen.key):
        if not path.is_file():
            raise ServerError(f"{path}: no such file. Give the PEM files of --tls-cert, --tls-key.")
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(listen.certificate, listen.key)
    except (OSError, ssl.SSLError) as error:
        raise ServerError(
            f"{listen.certificate}: not a certificate with the key {listen.key} ({error}). "
            "Give PEM files that belong together."
        ) from error


def serve(options: ServeOptions, listen: ListenOptions, place: socket.socket, tell: Tell) -> None:
    """Load the models and serve them on a bound socket, until a signal asks to end.

    `tell` hears what is ready. Raises: what keeps a model from being served.
    """
    # What clients send that is no HTTP is theirs to know; it would fill the log.
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    sys.setswitchinterval(SWITCH_S)
    metrics = Metrics()
    service = InferenceService(options, [metrics])
    service.start(tell)
    log = AccessLog() if listen.access_log else None
    try:
        app = build_app(service, metrics, listen.token, log)
        with asyncio.Runner(loop_factory=_loop_factory()) as runner:
            rpc = _start_rpc(service, listen, metrics, log)
            runner.run(_serve(service, listen, place, Server(service, listen, app), rpc, tell))
    finally:
        service.close()
        if log:
            log.close()


async def _start_rpc(
    service: InferenceService, listen: ListenOptions, metrics: Metrics, log: AccessLog | None
) -> "GrpcServer | None":
    """Listen for gRPC, if that is wanted."""
    if listen.grpc_port is None:
        return None
    from coat_deploy.serve.rpc.server import start_grpc

    return await start_grpc(service, listen, metrics, log)


async def _serve(
    service: InferenceService,
    listen: ListenOptions,
    place: socket.socket,
    server: "Server",
    rpc: Awaitable["GrpcServer | None"],
    tell: Tell,
) -> None:
    server.rpc = await rpc
    if server.rpc:
        tell(f"gRPC: {server.rpc.address}")
    tasks = [asyncio.create_task(_watch(service))] if service.options.reload_s else []
    try:
        scheme = "https" if listen.certificate else "http"
        host, port = place.getsockname()[:2]
        address = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"
        await server.serve_on(place, lambda: tell(f"ready: {address}"))
    finally:
        for task in tasks:
            task.cancel()


async def _watch(service: InferenceService) -> None:
    """Look for changed models, for ever."""
    while True:
        await asyncio.sleep(service.options.reload_s)
        try:
            await service.registry.refresh()
        except Exception:
            _log.exception("models could not be looked at for changes")


class Server(uvicorn.Server):
    """uvicorn, ending as we want it: first not ready, then deaf, then done, and `rpc` with it."""

    rpc: "GrpcServer | None" = None

    def __init__(self, service: InferenceService, listen: ListenOptions, app: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=connections(service.limits),
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,  # whoever asks may write what he likes into them
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(listen.drain_s)),
                ssl_certfile=listen.certificate,
                ssl_keyfile=listen.key,
            )
        )
        self._service, self._listen = service, listen
        self._ending_since = 0.0

    async def serve_on(self, place: socket.socket, tell: Callable[[], None]) -> None:
        """Serve until a signal; `tell` when connections are taken."""
        serving = asyncio.create_task(self.serve(sockets=[place]))
        while not self.started and not serving.done():
            await asyncio.sleep(0.001)
        if self.started:
            tell()
        await serving

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """End: whoever has been let in is answered."""
        self._service.drain()
        if self._listen.drain_delay_s:
            await asyncio.sleep(self._listen.drain_delay_s)
        places = sockets or []
        await asyncio.sleep(LINGER_S)
        turn_away(places)
        await asyncio.sleep(HANDSHAKE_S)
        await emptied(places, FIRST_WORD_S)
        for server in self.servers:
            server.close()
        ending = asyncio.create_task(self.rpc.stop(self._listen.drain_s)) if self.rpc else None
        await self._hear_out()
        await super().shutdown(sockets)
        while ending and not ending.done():
            await asyncio.wait({ending}, timeout=0.1)
            if self.rpc and self.force_exit:
                await self.rpc.stop(0)

    async def _hear_out(self) -> None:
        """Wait for requests that are on their way; idle connections are closed after it."""
        until = time.monotonic() + FIRST_WORD_S
        while time.monotonic() < until and not self.force_exit:
            if not any(getattr(c, "expecting", False) for c in self.server_state.connections):
                return
            await asyncio.sleep(0.02)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let a signal begin the end, and a second one hurry it; neither is an error."""
        heard = [s for s in SIGNALS if signal.getsignal(s) != signal.SIG_IGN]
        taken = {s: signal.signal(s, self._end) for s in heard}
        try:
            yield
        finally:
            for number, handler in taken.items():
                signal.signal(number, handler)

    def _end(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.should_exit:
            self.should_exit, self._ending_since = True, now
        elif now - self._ending_since > SAME_SIGNAL_S:
            self.force_exit = True


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:  # not on every system
        return asyncio.new_event_loop
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
