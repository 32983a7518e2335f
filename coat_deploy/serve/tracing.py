"""Traces for OpenTelemetry, where its packages are installed.

Where spans go is set by OpenTelemetry's own environment variables, and by whoever starts its SDK,
such as `opentelemetry-instrument`.
"""

import importlib.util
from typing import Any

from starlette.types import ASGIApp

HTTP_PACKAGE = "opentelemetry.instrumentation.asgi"
GRPC_PACKAGE = "opentelemetry.instrumentation.grpc"


def traced(app: ASGIApp) -> ASGIApp:
    """Return the application with a span a request, or as it is where the package is not there."""
    if not _installed(HTTP_PACKAGE):
        return app
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    wrapped: ASGIApp = OpenTelemetryMiddleware(app, excluded_urls="/v2/health/.*,/metrics")
    return wrapped


def grpc_interceptors() -> list[Any]:
    """Return what makes a span of a call over gRPC; none where the package is not there."""
    if not _installed(GRPC_PACKAGE):
        return []
    from opentelemetry.instrumentation.grpc import aio_server_interceptor, filters

    return [aio_server_interceptor(filter_=filters.negate(filters.health_check()))]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # not even the parent
        return False
