"""A model whose manifest lists artifacts; no file of theirs is needed to write a manifest."""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("jsonschema")
pytest.importorskip("yaml")

from coat_deploy.cli.app import main  # noqa: E402

CONFIG = {
    "architecture": "coat_lite_toy",
    "num_classes": 10,
    "pretrained_cfg": {"input_size": [3, 64, 64]},
}


@dataclass(frozen=True)
class Ran:
    """What came of a command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def artifact(target: str, precision: str, **more: Any) -> dict[str, Any]:
    """An entry of a manifest."""
    name = f"{target}-{precision}"
    return {
        "name": name, "target": target, "precision": precision, "form": "authored", "opset": 18,
        "size": [64, 64], "features": False, "files": {f"{name}.onnx": "0" * 64, "p.npz": "0" * 64},
        "proof": "p.npz", "weights_sha256": "0" * 64, "spec_digest": "0" * 64, "created": "now",
        "tools": {}, "agreement": {}, **more,
    }  # fmt: skip


def write(folder: Path, *artifacts: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    manifest = {"weights": None, "artifacts": artifacts}
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "models" / "toy", artifact("onnxruntime", "fp32"))
    return tmp_path / "models"


@pytest.fixture
def renamed(models: Path) -> Callable[[str], None]:
    """Add a model of another name."""
    return lambda name: write(models / name, artifact("onnxruntime", "fp32"))


@pytest.fixture
def engine(models: Path) -> None:
    """Let the model have an engine."""
    record = {
        "flavour": "TensorRT", "version": "10.13", "gpu": "A10", "compute_capability": "8.6",
        "graph_sha256": "0" * 64, "options": {}, "census": {},
        "profiles": [{"batch": [1, 8, 64], "height": [64] * 3, "width": [64] * 3}],
    }  # fmt: skip
    graph = artifact("onnxruntime", "fp32")
    write(models / "toy", graph, artifact("tensorrt", "fp16", engine=record))


@pytest.fixture
def only_features(models: Path) -> None:
    """Let the model give feature maps, and no logits."""
    write(models / "toy", artifact("onnxruntime", "fp32", features=True))


@pytest.fixture
def kserve(models: Path) -> Callable[..., Ran]:
    """Run `coat-deploy kserve` for a model."""

    def run(*words: object, model: str = "toy") -> Ran:
        out, err = io.StringIO(), io.StringIO()
        arguments = ["kserve", model, "--models", models, *words]
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main([str(word) for word in arguments])
            except SystemExit as left:
                status = left.code
        assert isinstance(status, int)
        return Ran(status, out.getvalue(), err.getvalue())

    return run
