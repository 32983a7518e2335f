"""Toy models that are served, and images to ask about."""

import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from PIL import Image
from starlette.testclient import TestClient

from coat_deploy.export import ExportOptions, export
from coat_deploy.measure.proof import probe_images
from coat_deploy.repository import Repository
from coat_deploy.serve.http import build_app
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.metrics import Metrics
from coat_deploy.serve.options import ServeOptions

ROOT = Path(__file__).resolve().parents[2]
# What is drawn is the same every time, and nothing of it is kept beside the sources.
os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", str(ROOT / ".pytest_cache" / "hypothesis"))
settings.register_profile(
    "repeatable",
    database=None,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("repeatable")

LABELS = ["bag", "boot", "coat", "dress", "hat"]
NAMES = ("coat_lite_toy", "coat_toy")


def write_toy(root: Path, name: str, seed: int = 0) -> None:
    """Export a model of a repository for onnxruntime, with random weights."""
    export(Repository.open(root), name, ExportOptions(weights=f"random:{seed}", validate=False))


@pytest.fixture(scope="session")
def export_toy() -> Callable[..., None]:
    """Export a model of a repository anew: root, name, seed."""
    return write_toy


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository of two toy models, exported; not to be written to."""
    root = tmp_path_factory.mktemp("served")
    for name in NAMES:
        (root / name).mkdir()
        config = {
            "architecture": name,
            "num_classes": len(LABELS),
            "label_names": LABELS,
            "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.9},
        }
        (root / name / "config.json").write_text(json.dumps(config))
        write_toy(root, name)
    return root


@pytest.fixture
def models(exported: Path, tmp_path: Path) -> Path:
    """A copy of `exported` that the test may do with as it likes."""
    return Path(shutil.copytree(exported, tmp_path / "models"))


@pytest.fixture
def serving(models: Path) -> Iterator[Callable[..., InferenceService]]:
    """Start a service of the models; keywords are fields of ServeOptions."""
    started: list[InferenceService] = []

    def start(**options: object) -> InferenceService:
        how = ServeOptions(**{"models": models, "threads": 2, "warm_up": 1, **options})
        service = InferenceService(how)
        started.append(service)
        service.start()
        return service

    yield start
    for service in started:
        service.close()


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    """A photograph of a kind, as a JPEG file."""
    content = io.BytesIO()
    (pixels,) = probe_images((90, 120), 1)
    Image.fromarray(pixels.transpose(1, 2, 0)).save(content, "JPEG")
    return content.getvalue()


@pytest.fixture(scope="session")
def shared_service(exported: Path) -> Iterator[InferenceService]:
    """A service that tests ask and do not change."""
    service = InferenceService(ServeOptions(models=exported, threads=2, warm_up=1))
    service.start()
    yield service
    service.close()


@pytest.fixture
def client(shared_service: InferenceService) -> TestClient:
    """A client of the service over HTTP, without sockets."""
    return client_of(shared_service)


def client_of(service: InferenceService, **how: object) -> TestClient:
    return TestClient(build_app(service, Metrics(), **how), raise_server_exceptions=False)


@pytest.fixture
def http() -> Callable[..., TestClient]:
    """Make a client of a service; keywords are those of `build_app`."""
    return client_of


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    process: "subprocess.Popen[str]"
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout=60)

    def ask(
        self, method: str, path: str, body: bytes | None = None, **headers: str
    ) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers of one request on a connection of its own."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read(), {k.lower(): v for k, v in answer.getheaders()}

    def end(self) -> tuple[int, str]:
        """Ask it to end; return its status and what it said."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=60)
        return self.process.returncode, said


READY = re.compile(r"ready: https?://127\.0\.0\.1:(\d+)")


@pytest.fixture
def running(exported: Path) -> Iterator[Callable[..., Running]]:
    """Start `coat-deploy serve` with some words, and wait until it is ready."""
    started: list[subprocess.Popen[str]] = []

    def start(*words: object, models: Path = exported) -> Running:
        command = [sys.executable, str(ROOT / "cli.py"), "serve", "--models", str(models)]
        process = subprocess.Popen(
            [*command, "--port", "0", "--grpc-port", "0", "--threads", "2", *map(str, words)],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        assert process.stderr is not None
        said = ""
        for line in process.stderr:
            said += line
            if found := READY.search(line):
                return Running(process, int(found[1]))
        raise AssertionError(f"it did not become ready: {said}")

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)
