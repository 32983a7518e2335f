"""What the tests of the graphs share: toy networks with weights in which every term matters."""

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import ModelProto

from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.form import GraphForm
from coat_deploy.network.coat import create_network
from coat_deploy.network.variants import get_variant
from coat_deploy.network.weights import load_checkpoint
from coat_deploy.runner import FEATURES, LOGITS
from coat_deploy.spec import ModelSpec, Preprocess

Outputs = Mapping[str, np.ndarray]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Toys are too small for threads: on busy cores they only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Case:
    """A network by its spec and weights, to be authored and to be run in PyTorch."""

    spec: ModelSpec
    weights: dict[str, np.ndarray]

    def graph(
        self,
        size: tuple[int, int] | None = (64, 64),
        *,
        features: bool = False,
        opset: int = 20,
        form: GraphForm | None = None,
    ) -> ModelProto:
        options = GraphOptions(size, features, opset)
        return author_graph(self.spec, self.weights, form or GraphForm(), options)

    def network(self, features: bool = False, dtype: torch.dtype = torch.float32) -> Any:
        network = create_network(
            self.spec.architecture, self.spec.num_classes, features=features, **self.spec.model_args
        )
        network = network.to(dtype)  # first, or float64 weights would be rounded
        state = {key: torch.from_numpy(value) for key, value in self.weights.items()}
        network.load_state_dict(state, strict=not features)
        return network.eval()

    def eager(self, pixels: np.ndarray, features: bool = False) -> Outputs:
        """Return the network's outputs, computed in float64: the truth of all comparisons."""
        with torch.inference_mode():
            network = self.network(features, torch.float64)
            output = network(torch.from_numpy(pixels.astype(np.float64)))
        if features:
            return {name: x.numpy() for name, x in zip(FEATURES, output, strict=True)}
        return {LOGITS: output.numpy()}


@functools.cache
def _case(name: str, num_classes: int, model_args: tuple[tuple[str, Any], ...]) -> Case:
    side = get_variant(name).input_size
    spec = ModelSpec(
        name,
        num_classes,
        get_variant(name).num_features,
        Preprocess((side, side)),
        model_args=dict(model_args),
    )
    return Case(spec, load_checkpoint("random:1", spec).tensors)


@pytest.fixture(scope="session")
def make_case() -> Callable[..., Case]:
    """Return `make(name, num_classes=10, **model_args)`."""

    def make(name: str, num_classes: int = 10, **model_args: Any) -> Case:
        return _case(name, num_classes, tuple(model_args.items()))

    return make


@pytest.fixture(scope="session")
def pixels() -> Callable[..., np.ndarray]:
    """Return `draw(batch, size)`, float32 pixels (B, 3, H, W) of mean 0 and variance 1."""

    def draw(batch: int = 2, size: tuple[int, int] = (64, 64), seed: int = 0) -> np.ndarray:
        random = np.random.Generator(np.random.PCG64(seed))
        return random.standard_normal((batch, 3, *size)).astype(np.float32)

    return draw


@pytest.fixture(scope="session")
def open_session() -> Callable[[ModelProto | str], Callable[[np.ndarray], Outputs]]:
    """Return `open(model)`, which loads a graph or a file into onnxruntime once, to run often."""

    def load(model: ModelProto | str) -> Callable[[np.ndarray], Outputs]:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        options.log_severity_level = 3
        source = model if isinstance(model, str) else model.SerializeToString()
        session = onnxruntime.InferenceSession(source, options, ["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return lambda x: dict(zip(names, session.run(None, {"pixels": x}), strict=True))

    return load
