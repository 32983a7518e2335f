import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

from coat_deploy.serve import tracing


def test_without_its_packages_nothing_is_traced(monkeypatch):
    monkeypatch.setattr(tracing.importlib.util, "find_spec", lambda name: None)
    assert tracing.traced("app") == "app"


def test_with_its_packages_requests_are_spans(monkeypatch):
    wrapped = []
    module = ModuleType(tracing.PACKAGE)
    module.OpenTelemetryMiddleware = lambda app, **how: wrapped.append((app, how)) or "traced"
    for name in ("opentelemetry", "opentelemetry.instrumentation"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, tracing.PACKAGE, module)
    spec = ModuleSpec(tracing.PACKAGE, None)
    monkeypatch.setattr(tracing.importlib.util, "find_spec", lambda name: spec)
    assert tracing.traced("app") == "traced"
    ((app, how),) = wrapped
    assert app == "app" and "health" in how["excluded_urls"]
