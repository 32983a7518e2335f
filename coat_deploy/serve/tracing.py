"""Traces for OpenTelemetry, where its packages are installed."""

import importlib.util

from starlette.types import ASGIApp

PACKAGE = "opentelemetry.instrumentation.asgi"


def traced(app: ASGIApp) -> ASGIApp:
    """Return the application with a span a request, or as it is where the packages are not there.

    Where spans go is set by OpenTelemetry's own environment variables.
    """
    try:
        found = importlib.util.find_spec(PACKAGE)
    except ModuleNotFoundError:  # not even the parent
        found = None
    if found is None:
        return app
    from opentelemetry.instrumentation.asgi import OpenTelemetryMiddleware

    wrapped: ASGIApp = OpenTelemetryMiddleware(app, excluded_urls="/v2/health/.*,/metrics")
    return wrapped
