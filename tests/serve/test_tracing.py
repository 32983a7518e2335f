import asyncio

import grpc
import pytest
from google.protobuf.message_factory import GetMessageClass
from starlette.testclient import TestClient

from coat_deploy.serve import tracing
from coat_deploy.serve.http import build_app
from coat_deploy.serve.metrics import Metrics
from coat_deploy.serve.options import ListenOptions
from coat_deploy.serve.rpc.messages import PROTOCOL
from coat_deploy.serve.rpc.server import start_grpc


@pytest.fixture(scope="module")
def exporter():
    """Where spans end up; OpenTelemetry takes one provider a process."""
    pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry's SDK is not installed")
    from opentelemetry import trace
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

    exporter = InMemorySpanExporter()
    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    trace.set_tracer_provider(provider)
    return exporter


@pytest.fixture
def spans(exporter):
    """Return the spans of servers that ended since the test began."""
    from opentelemetry.trace import SpanKind

    exporter.clear()
    return lambda: [s for s in exporter.get_finished_spans() if s.kind is SpanKind.SERVER]


def test_without_its_packages_nothing_is_traced(monkeypatch):
    monkeypatch.setattr(tracing.importlib.util, "find_spec", lambda name: None)
    assert tracing.traced("app") == "app"
    assert tracing.grpc_interceptors() == []


def test_where_nobody_started_its_sdk_nothing_is_traced(monkeypatch):
    trace = pytest.importorskip("opentelemetry.trace")
    pytest.importorskip("opentelemetry.instrumentation.asgi")
    monkeypatch.setattr(trace, "get_tracer_provider", trace.ProxyTracerProvider)
    assert tracing.traced("app") == "app"
    assert tracing.grpc_interceptors() == []


def test_requests_over_http_are_spans_and_looks_at_health_are_not(spans, shared_service):
    client = TestClient(build_app(shared_service, Metrics()), raise_server_exceptions=False)
    assert client.get("/v2/models/coat_toy").status_code == 200
    assert client.get("/v2/models/nosuch").status_code == 404
    assert client.get("/v2/health/live").status_code == 200
    keys = ("http.target", "http.status_code")
    found = [tuple(span.attributes[key] for key in keys) for span in spans()]
    assert found == [("/v2/models/coat_toy", 200), ("/v2/models/nosuch", 404)]


def test_calls_over_grpc_are_spans_and_looks_at_health_are_not(spans, shared_service):
    async def ask() -> None:
        server = await start_grpc(shared_service, ListenOptions(port=0, grpc_port=0))
        async with grpc.aio.insecure_channel(server.address) as channel:
            asked = GetMessageClass(PROTOCOL.methods_by_name["ModelMetadata"].input_type)
            call = channel.unary_unary(f"/{PROTOCOL.full_name}/ModelMetadata")
            await call(asked(name="coat_toy").SerializeToString(), timeout=20)
            with pytest.raises(grpc.aio.AioRpcError, match="nosuch"):
                await call(asked(name="nosuch").SerializeToString(), timeout=20)
            await channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=20)
        await server.stop(1)

    asyncio.run(ask())
    found = [(span.name, span.attributes["rpc.grpc.status_code"]) for span in spans()]
    method = f"/{PROTOCOL.full_name}/ModelMetadata"
    assert found == [(method, 0), (method, grpc.StatusCode.NOT_FOUND.value[0])]
