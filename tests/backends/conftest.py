"""What the tests of the backends share: a model folder and the graphs made from it."""

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.form import GraphForm, get_form
from coat_deploy.graph.serialise import serialise
from coat_deploy.network.coat import create_network
from coat_deploy.network.variants import get_variant
from coat_deploy.network.weights import load_checkpoint
from coat_deploy.runner import FEATURES, LOGITS
from coat_deploy.spec import ModelSpec, Preprocess


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Toys are too small for threads, and loading the eager network may set their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class ModelFolder:
    """A toy model on disk, as a repository holds it."""

    path: Path
    spec: ModelSpec
    weights: dict[str, np.ndarray]

    def write_graph(
        self,
        folder: Path,
        size: tuple[int, int] | None = (64, 64),
        target: str = "onnxruntime",
        features: bool = False,
        limit: int | None = None,
        form: GraphForm | None = None,
    ) -> Path:
        """Write the authored graph of a target into `folder`; return its path."""
        form = form or get_form(target, "fp32")
        graph = author_graph(self.spec, self.weights, form, GraphOptions(size, features))
        files = serialise(graph, "toy.onnx", *([limit] if limit else []))
        for file, content in files.items():
            (folder / file).write_bytes(content)
        return folder / "toy.onnx"

    def expected(self, pixels: np.ndarray, features: bool = False) -> dict[str, np.ndarray]:
        """Return the network's outputs in float64."""
        network = create_network(self.spec.architecture, 10, features=features).double().eval()
        state = {key: torch.from_numpy(value) for key, value in self.weights.items()}
        network.load_state_dict(state, strict=not features)
        with torch.inference_mode():
            output = network(torch.from_numpy(pixels.astype(np.float64)))
        outputs = output if features else (output,)
        names = FEATURES if features else (LOGITS,)
        return {name: value.numpy() for name, value in zip(names, outputs, strict=True)}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    return random_model(tmp_path_factory, "coat_toy")


@pytest.fixture(scope="session", params=["coat_nano", "coat_lite_nano"])
def nano(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelFolder:
    """The variants of our own that are for use, not only for tests."""
    return random_model(tmp_path_factory, request.param)


def random_model(tmp_path_factory: pytest.TempPathFactory, name: str) -> ModelFolder:
    variant = get_variant(name)
    spec = ModelSpec(name, 10, variant.num_features, Preprocess((64, 64)), timm=variant.timm)
    weights = load_checkpoint("random:1", spec).tensors
    folder = tmp_path_factory.mktemp("models") / name
    write_model(folder, spec, weights)
    return ModelFolder(folder, spec, weights)


@pytest.fixture
def other_model(model: ModelFolder, tmp_path: Path) -> Callable[..., Path]:
    """Return `write(**changes of the spec)`: a folder whose config and weights may not match."""

    def write(**changes: object) -> Path:
        write_model(tmp_path / "other", replace(model.spec, **changes), model.weights)
        return tmp_path / "other"

    return write


def write_model(folder: Path, spec: ModelSpec, weights: dict[str, np.ndarray]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(spec.to_json()))
    save_file({k: v.copy() for k, v in weights.items()}, folder / "model.safetensors")


@pytest.fixture(scope="session")
def pixels() -> Callable[..., np.ndarray]:
    """Return `draw(batch, size)`, float32 pixels (B, 3, H, W) of mean 0 and variance 1."""

    def draw(batch: int = 2, size: tuple[int, int] = (64, 64)) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64(0))
        return random.standard_normal((batch, 3, *size)).astype(np.float32)

    return draw


@pytest.fixture(scope="session")
def distance() -> Callable[[np.ndarray, np.ndarray], float]:
    """Return a function for the largest difference, relative to the largest value expected."""

    def largest(got: np.ndarray, expected: np.ndarray) -> float:
        assert got.dtype == np.float32
        assert got.shape == expected.shape
        assert np.isfinite(got).all()
        return float(np.abs(got - expected).max() / np.abs(expected).max())

    return largest


@pytest.fixture
def at_once() -> Callable[..., list[list[Any]]]:
    """Return `run(*calls, times)`: every call in a thread of its own, repeated, all at once.

    Returns the values of each call. That they overlap is made sure of by a meeting before each.
    """

    def run(*calls: Callable[[], Any], times: int = 5) -> list[list[Any]]:
        meeting = threading.Barrier(len(calls))

        def repeat(call: Callable[[], Any]) -> list[Any]:
            values = []
            for _ in range(times):
                meeting.wait(60)
                values.append(call())
            return values

        with ThreadPoolExecutor(len(calls)) as pool:
            return list(pool.map(repeat, calls))

    return run
