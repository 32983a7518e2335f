"""The networks of a report: random weights, which need no file; in PyTorch, or as a graph."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.images import normalise
from coat_deploy.measure.proof import probe_images
from coat_deploy.network.variants import get_variant
from coat_deploy.network.weights import load_checkpoint
from coat_deploy.runner import Pixels
from coat_deploy.spec import ModelSpec, Preprocess

WEIGHTS = "random:0"
CLASSES = 1000


def spec_of(variant: str) -> ModelSpec:
    """Return the spec of a variant of its own image size."""
    row = get_variant(variant)
    return ModelSpec(
        variant, CLASSES, row.num_features, Preprocess((row.input_size,) * 2), timm=row.timm
    )


def in_torch(variant: str, device: str) -> Any:
    """Return the network on a device, float32, in evaluation mode."""
    import torch

    from coat_deploy.network.coat import create_network

    if device == "cpu":
        torch.set_num_threads(1)  # a dry run of small networks: threads would only wait
    network = create_network(variant, CLASSES).eval()
    tensors = load_checkpoint(WEIGHTS, spec_of(variant)).tensors
    network.load_state_dict({key: torch.from_numpy(value) for key, value in tensors.items()})
    return network.to(device)


def images(variant: str, batch: int, seed: int = 0) -> Pixels:
    """Return synthetic images of a variant's size."""
    how = spec_of(variant).preprocess
    few = normalise(probe_images(how.input_size, min(batch, 8), seed), how.mean, how.std)
    return np.ascontiguousarray(np.resize(few, (batch, *few.shape[1:])))


@dataclass(frozen=True)
class Graph:
    """A graph in a file, and what its nodes shall compute in."""

    path: Path
    asked: Any


def write_graph(variant: str, target: str, precision: str, folder: Path) -> Graph:
    """Write the authored graph of a target and precision. Raises GraphError."""
    from coat_deploy.graph.author import DEFAULT_OPSET
    from coat_deploy.graph.coat import GraphOptions, author_graph
    from coat_deploy.graph.form import get_form
    from coat_deploy.graph.precision import MIN_OPSETS, Lowering, asked_of, lower
    from coat_deploy.graph.serialise import serialise

    spec, form = spec_of(variant), get_form(target, precision)
    opset = max(DEFAULT_OPSET, MIN_OPSETS.get(form.types, 0))
    options = GraphOptions(spec.preprocess.input_size, False, opset)
    graph = author_graph(spec, load_checkpoint(WEIGHTS, spec).tensors, form, options)
    lowering = Lowering(form.types)
    if form.types != "fp32":
        graph = lower(graph, lowering)
    name = f"{variant}-{target}-{precision}.onnx"
    for file, content in serialise(graph, name).items():
        (folder / file).write_bytes(content)
    return Graph(folder / name, asked_of(graph, lowering))
