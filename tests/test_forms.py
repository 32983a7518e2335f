"""Every form of every variant, in the runtime and precision it is for, against PyTorch."""

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from coat_deploy.backends.eager import EagerRunner
from coat_deploy.backends.select import ENGINES, GPU_PRECISIONS, require
from coat_deploy.digest import sha256_bytes
from coat_deploy.errors import RunnerError
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
        network = create_network(spec.architecture, spec.num_classes).eval()
        network.load_state_dict({k: torch.from_numpy(v) for k, v in self.weights.items()})
        super().__init__(network, LoadOptions())
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
    reference = reference_of(spec.architecture)
    form = get_form(target, precision)
    options = GraphOptions(size, opset=MIN_OPSETS.get(form.types, DEFAULT_OPSET))
    graph = author_graph(spec, reference.weights, form, options)
    load = LoadOptions(precision=precision)
    if target in ENGINES or precision in GPU_PRECISIONS.get(target, ()):
        # What builds and runs them is tested elsewhere, here what they are built of: as it is.
        target = NODE_BY_NODE[form.types]
        load = LoadOptions(precision=precision, optimise=False)
    if form.types != "fp32":
        graph = lower(graph, Lowering(form.types))
    file = folder / "net.onnx"
    file.write_bytes(graph.SerializeToString())
    try:
        runner = require(target).load(file, load)
    except RunnerError as error:
        pytest.skip(str(error))  # a processor without bf16
    images = [batch for side in sizes for batch in batches(side, spec.architecture in LARGE)]
    bar = get_bar(precision).for_few_images()
    with runner:
        found = validate(reference, runner, images, bar)
    assert found.failures == ()


def test_forms_that_are_the_same_are_tested_once() -> None:
    assert FORMS["tensorrt-rtx"] == FORMS["tensorrt"]
    assert FORMS["tensorrt"]["tf32"] == FORMS["tensorrt"]["fp32"]
