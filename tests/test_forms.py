"""Every form of every variant, in the runtime and precision it is for, against PyTorch."""

import functools
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import ModelProto

from coat_deploy.backends.eager import EagerRunner
from coat_deploy.backends.select import ENGINES, GPU_PRECISIONS, require
from coat_deploy.digest import sha256_bytes
from coat_deploy.errors import PrecisionMissing
from coat_deploy.graph.author import DEFAULT_OPSET
from coat_deploy.graph.coat import GraphOptions, author_graph
from coat_deploy.graph.form import FORMS, get_form
from coat_deploy.graph.precision import MIN_OPSETS, Lowering, lower
from coat_deploy.images import load, normalise
from coat_deploy.measure.bar import get_bar
from coat_deploy.measure.proof import probe_images
from coat_deploy.measure.validate import Batch, validate
from coat_deploy.network.coat import create_network
from coat_deploy.network.variants import VARIANTS
from coat_deploy.network.weights import load_checkpoint
from coat_deploy.runner import Array, LoadOptions, Pixels
from coat_deploy.spec import ModelSpec, Preprocess, Size

SAME = {("tensorrt", "tf32"), *(("tensorrt-rtx", precision) for precision in FORMS["tensorrt"])}
"""Forms that are another's."""
CHOICES = [
    (target, precision)
    for target, forms in FORMS.items()
    for precision in forms
    if (target, precision) not in SAME
]
PHOTOGRAPHS = Path(__file__).resolve().parents[2] / "shared" / "data" / "clothing-256-calibration"
NODE_BY_NODE = {"fp32": "onnxruntime", "fp16": "onnxruntime", "bf16": "openvino"}
"""What has kernels for each type on a CPU."""
LARGE = {"coat_lite_medium", "coat_lite_medium_384", "coat_small"}


def make_spec(name: str) -> ModelSpec:
    side = VARIANTS[name].input_size
    return ModelSpec(name, 100, VARIANTS[name].num_features, Preprocess((side, side)))


def batches(size: Size, large: bool = False) -> Iterator[Batch]:
    """Two images together, and one alone of small networks: photographs, if there are some."""
    how = Preprocess(size)
    files = sorted(PHOTOGRAPHS.rglob("*.jpg"))[::200][:3]
    if files:
        pixels = np.stack([load(file, how) for file in files])
    else:
        pixels = normalise(probe_images(size, 3), how.mean, how.std)
    for part in (slice(1, 3),) if large else (slice(0, 1), slice(1, 3)):
        yield Batch(pixels[part], tuple(f"image {i}" for i in range(3)[part]))


class Reference(EagerRunner):
    """The network in PyTorch, which computes an image once for all the forms held against it."""

    def __init__(self, spec: ModelSpec) -> None:
        self.weights = load_checkpoint("random:0", spec).tensors
        with torch.device("meta"):  # no weights are drawn that are not used
            network = create_network(spec.architecture, spec.num_classes).eval()
        state = {k: torch.from_numpy(v) for k, v in self.weights.items()}
        network.load_state_dict(state, assign=True)
        super().__init__(network, LoadOptions(threads=1))
        self._known: dict[bytes, Mapping[str, Array]] = {}

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        key = sha256_bytes(pixels.tobytes()).encode()
        if key not in self._known:
            self._known[key] = super().run(pixels)
        return self._known[key]


@functools.lru_cache(maxsize=1)
def reference_of(name: str) -> Reference:
    """Return the reference of a variant; the forms of one are tested one after the other."""
    return Reference(make_spec(name))


def runs_in(target: str, precision: str) -> tuple[str, LoadOptions]:
    """Return what computes a form here, in one thread: a session is then made but once."""
    if target in ENGINES or precision in GPU_PRECISIONS.get(target, ()):
        # What builds and runs them is tested elsewhere, here what they are built of: as it is.
        runtime = NODE_BY_NODE[get_form(target, precision).types]
        return runtime, LoadOptions(precision=precision, optimise=False, threads=1)
    return target, LoadOptions(precision=precision, threads=1)


@functools.cache
def problem(target: str, precision: str) -> str | None:
    """Return why this processor does not compute a form, as one without bf16, or None.

    A toy tells, before a large network is made.
    """
    spec = make_spec("coat_lite_toy")
    graph = author(spec, load_checkpoint("random:0", spec).tensors, target, precision, None)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "toy.onnx"
        file.write_bytes(graph.SerializeToString())
        runtime, load = runs_in(target, precision)
        try:
            require(runtime).load(file, load).close()
        except PrecisionMissing as error:
            return str(error).replace(folder, "")
    return None


@pytest.mark.parametrize(("target", "precision"), CHOICES)
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] if name in LARGE else []) for name in VARIANTS],
)
def test_a_form_is_the_network(tmp_path, name, target, precision) -> None:
    spec = make_spec(name)
    agree(
        tmp_path, spec, target, precision, spec.preprocess.input_size, [spec.preprocess.input_size]
    )


@pytest.mark.parametrize(("target", "precision"), CHOICES)
@pytest.mark.parametrize("name", ["coat_lite_nano", "coat_nano"])
def test_a_form_of_open_size_is_the_network_at_any(tmp_path, name, target, precision) -> None:
    agree(tmp_path, make_spec(name), target, precision, None, [(64, 64), (96, 50), (33, 75)])


def agree(
    folder: Path,
    spec: ModelSpec,
    target: str,
    precision: str,
    size: Size | None,
    sizes: list[Size],
) -> None:
    if reason := problem(target, precision):
        pytest.skip(reason)
    reference = reference_of(spec.architecture)
    graph = author(spec, reference.weights, target, precision, size)
    file = folder / "net.onnx"
    file.write_bytes(graph.SerializeToString())
    runtime, load = runs_in(target, precision)
    images = [batch for side in sizes for batch in batches(side, spec.architecture in LARGE)]
    bar = get_bar(precision).for_few_images()
    with require(runtime).load(file, load) as runner:
        found = validate(reference, runner, images, bar)
    assert found.failures == ()


def author(
    spec: ModelSpec, weights: Mapping[str, Array], target: str, precision: str, size: Size | None
) -> ModelProto:
    form = get_form(target, precision)
    options = GraphOptions(size, opset=MIN_OPSETS.get(form.types, DEFAULT_OPSET))
    graph = author_graph(spec, weights, form, options)
    return graph if form.types == "fp32" else lower(graph, Lowering(form.types))


def test_forms_that_are_the_same_are_tested_once() -> None:
    assert FORMS["tensorrt-rtx"] == FORMS["tensorrt"]
    assert FORMS["tensorrt"]["tf32"] == FORMS["tensorrt"]["fp32"]
