"""Toy models that are served, and images to ask about."""

import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image
from starlette.testclient import TestClient

from coat_deploy.export import ExportOptions, export
from coat_deploy.measure.proof import probe_images
from coat_deploy.repository import Repository
from coat_deploy.serve.http import build_app
from coat_deploy.serve.inference import InferenceService
from coat_deploy.serve.metrics import Metrics
from coat_deploy.serve.options import ServeOptions

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
