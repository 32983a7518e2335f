"""Where gRPC listens, looked at before gRPC is loaded."""

import socket

from coat_deploy.errors import ServerError
from coat_deploy.serve.options import ListenOptions


def check_free(listen: ListenOptions) -> None:
    """Raise ServerError for an address that cannot be had; gRPC would write pages about it."""
    try:
        found = socket.getaddrinfo(listen.host, listen.grpc_port, type=socket.SOCK_STREAM)
        family, kind, _, _, place = found[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        raise cannot_listen(listen, error.strerror or str(error)) from error


def address(listen: ListenOptions, port: int | None = None) -> str:
    """Return the address as one word."""
    host = f"[{listen.host}]" if ":" in listen.host else listen.host
    return f"{host}:{listen.grpc_port if port is None else port}"


def cannot_listen(listen: ListenOptions, reason: str) -> ServerError:
    """Return the error for an address that cannot be had."""
    return ServerError(
        f"{address(listen)}: gRPC cannot listen there ({reason:.200}). "
        "Choose another --grpc-port, or 0 for none."
    )
