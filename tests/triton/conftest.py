"""A toy model with an artifact of every kind, photographs, and Triton's own schema."""

import ast
import contextlib
import dataclasses
import importlib.util
import io
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

torch = pytest.importorskip("torch")
pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from coat_deploy.artifact import Artifact  # noqa: E402
from coat_deploy.cli.app import main  # noqa: E402
from coat_deploy.digest import sha256_bytes  # noqa: E402
from coat_deploy.engine import EngineRecord, Profile  # noqa: E402
from coat_deploy.measure.proof import probe_images  # noqa: E402
from coat_deploy.model import ArtifactQuery, Model  # noqa: E402

LABELS = [
    "bag",
    'boot "left"',
    "coat: long",
    "dress",
    "hat",
    "pants",
    "shirt",
    "ß",
    "skirt",
    "sock",
]
CONFIG = {
    "architecture": "coat_lite_toy",
    "num_classes": len(LABELS),
    "label_names": LABELS,
    "pretrained_cfg": {"input_size": [3, 64, 96], "crop_pct": 0.9},
}
EXPORTS = ((), ("--size", "dynamic"), ("--features",), ("--size", "dynamic", "--features"))
PROFILES = (Profile.of((1, 1, 1), (64, 96)), Profile.of((1, 8, 32), (64, 96)))


@dataclass(frozen=True)
class Ran:
    """What came of a command."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def run_here(*words: object) -> Ran:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as left:
            status = left.code
    assert isinstance(status, int)
    return Ran(status, out.getvalue(), err.getvalue())


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COAT_MODELS", raising=False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def cli() -> Callable[..., Ran]:
    """Run a command line in this process, as far as its exit."""
    return run_here


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A repository with the model `toy`; not to be written to."""
    torch.set_num_threads(1)
    models = tmp_path_factory.mktemp("exported")
    (models / "toy").mkdir()
    (models / "toy" / "config.json").write_text(json.dumps(CONFIG))
    for words in EXPORTS:
        made = run_here("export", "toy", "--weights", "random:0", "--models", models, *words)
        assert made.status == 0, made.err
    return models


@pytest.fixture
def models(exported: Path, tmp_path: Path) -> Path:
    """A copy of `exported` that the test may do with as it likes."""
    return Path(shutil.copytree(exported, tmp_path / "models"))


@pytest.fixture
def triton(models: Path, tmp_path: Path) -> Callable[..., Ran]:
    """Run `coat-deploy triton` for a model, into the folder `repository`."""

    def run(*words: object, model: str = "toy") -> Ran:
        where = ("--models", models, "--out", tmp_path / "repository")
        return run_here("triton", model, *where, *words)

    return run


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    return tmp_path / "repository"


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """JPEG files; the last one is turned by its EXIF orientation."""
    folder = tmp_path_factory.mktemp("photos")
    files = []
    for i, pixels in enumerate(probe_images((90, 120), 4)):
        exif = Image.Exif()
        exif[274] = 6 if i == 3 else 1
        files.append(folder / f"{i}.jpg")
        Image.fromarray(pixels.transpose(1, 2, 0)).save(files[-1], exif=exif)
    return files


@pytest.fixture
def add_engine() -> Callable[..., Artifact]:
    """Add an engine to a model folder, as an export on a GPU does; its bytes are no engine's."""

    def add(folder: Path, capability: str | None = "8.6", **changes: Any) -> Artifact:
        model = Model(folder)
        graph = model.find(ArtifactQuery("onnxruntime"))
        record = changes.pop("record", {})
        name = changes.pop("name", "tensorrt-fp16")
        plan = f"engine for {capability}".encode()
        engine = EngineRecord(
            **{
                "flavour": "TensorRT",
                "version": "10.13.3",
                "gpu": "NVIDIA A10",
                "compute_capability": capability,
                "graph_sha256": graph.sha256,
                "profiles": PROFILES,
                **record,
            }
        )
        files = {f"{name}.engine": plan, f"{name}.log": b"log", f"{name}.proof.npz": b"proof"}
        fields = {
            "name": name,
            "target": "tensorrt",
            "precision": "fp16",
            "files": {file: sha256_bytes(content) for file, content in files.items()},
            "proof": f"{name}.proof.npz",
            "engine": engine,
            **changes,
        }
        artifact = dataclasses.replace(graph, **fields)
        with model.staging() as staging:
            for file, content in files.items():
                staging.write(f"1/{file}", content)
            staging.commit(artifact, None)
        return artifact

    return add


@pytest.fixture
def configs(repository: Path) -> Callable[[], dict[str, Any]]:
    """Return every model's config in the repository, parsed by Triton's schema, by its name."""

    def read() -> dict[str, Any]:
        texts = {path.parent.name: path.read_text() for path in repository.glob("*/config.pbtxt")}
        parsed = {name: _model_config(text) for name, text in texts.items()}
        assert all(config.name == name for name, config in parsed.items())
        return parsed

    return read


def _model_config(text: str) -> Any:
    """Parse a config.pbtxt; fields and types that Triton does not know are errors."""
    text_format = pytest.importorskip("google.protobuf.text_format")
    return text_format.Parse(text, _message_class()())


def _message_class() -> Any:
    """Return the class of ModelConfig, in a pool of its own.

    Two modules that describe Triton's messages cannot be imported into one process, and the
    server's tests may have imported another.
    """
    from google.protobuf import descriptor_pool, message_factory

    package = importlib.util.find_spec("tritonclient")
    if package is None:
        pytest.skip('needs tritonclient: pip install "tritonclient[grpc]"')
    (folder,) = package.submodule_search_locations or ()
    tree = ast.parse(Path(folder, "grpc", "model_config_pb2.py").read_text(encoding="utf-8"))
    (described,) = (
        node.args[0].value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "AddSerializedFile"
        and isinstance(node.args[0], ast.Constant)
    )
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(described)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("inference.ModelConfig"))
