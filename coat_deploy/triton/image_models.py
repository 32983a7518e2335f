"""The two models around the network that let it take images: what decodes, and the ensemble.

    image (encoded) > NAME_preprocess > pixels > NAME > logits

What decodes is Triton's Python backend with a copy of this package's own files for it, so that
pixels are those of the validation, whatever version of the package the server has, if any.
"""

import dataclasses
import io
import json
import struct
from pathlib import Path

from PIL import Image

from coat_deploy.measure.proof import probe_images
from coat_deploy.runner import INPUT
from coat_deploy.triton.config import FLOAT, outputs, tensor
from coat_deploy.triton.pbtxt import Word, map_of, render
from coat_deploy.triton.plan import IMAGE, Plan

ENCODED = Word("TYPE_STRING")
WARM_UP_FILE = "image"
PACKAGE = "coat_deploy"
MODULES = ("errors", "image_structure", "images", "machine", "runner", "spec", "version")
"""Modules that `images` consists of; each imports nothing but these, NumPy and Pillow."""

_ABOUT = '"""The part of coat-deploy that prepares images, as it was when this was written."""\n'
_WARM_UP_SIZE = (256, 320)


def preprocess_config(plan: Plan) -> str:
    """Return the config.pbtxt of what decodes."""
    how = plan.model.spec.preprocess.at(plan.nominal)
    image = {"data_type": ENCODED, "dims": [1], "input_data_file": WARM_UP_FILE}
    config = {
        "name": _preprocess(plan),
        "backend": "python",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": plan.max_batch,
        "input": [tensor(IMAGE, ENCODED, [1])],
        "output": [tensor(INPUT, FLOAT, [3, *plan.nominal])],
        "instance_group": [{"count": plan.options.decoders, "kind": Word("KIND_CPU")}],
        "parameters": map_of({"preprocess": {"string_value": json.dumps(dataclasses.asdict(how))}}),
        "model_warmup": [{"name": "image", "batch_size": 1, "inputs": map_of({IMAGE: image})}],
    }
    needs = (
        "# Needs NumPy, Pillow 10.3 and Python 3.11, or later ones, in the server's container.\n"
    )
    return needs + render(config)


def ensemble_config(plan: Plan) -> str:
    """Return the config.pbtxt of the ensemble."""
    names = {name: name for name in plan.output_shapes}
    steps = [_step(_preprocess(plan), {IMAGE: IMAGE}, {INPUT: INPUT})]
    steps += [_step(plan.name, {INPUT: INPUT}, names)]
    config = {
        "name": plan.folders[2],
        "platform": "ensemble",
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": plan.max_batch,
        "input": [tensor(IMAGE, ENCODED, [1])],
        "output": outputs(plan),
        "ensemble_scheduling": {"step": steps},
    }
    return render(config)


def preprocess_files() -> dict[str, bytes]:
    """Return the files of what decodes, below its folder: code, and an image to warm up with."""
    here = Path(__file__).parent
    files = {f"1/{PACKAGE}/__init__.py": _ABOUT.encode()}
    for module in MODULES:
        files[f"1/{PACKAGE}/{module}.py"] = (here.parent / f"{module}.py").read_bytes()
    files["1/model.py"] = (here / "preprocess_model.py").read_bytes()
    files[f"warmup/{WARM_UP_FILE}"] = _warm_up_image()
    return files


def _preprocess(plan: Plan) -> str:
    return plan.folders[1]


def _step(name: str, inputs: dict[str, str], results: dict[str, str]) -> dict[str, object]:
    step: dict[str, object] = {"model_name": name, "model_version": -1}
    # A map's key is the model's tensor, its value the ensemble's.
    return step | {"input_map": map_of(inputs), "output_map": map_of(results)}


def _warm_up_image() -> bytes:
    """Return a JPEG as Triton reads texts of a file: its length, then the bytes."""
    (pixels,) = probe_images(_WARM_UP_SIZE, 1)
    encoded = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(encoded, "JPEG")
    return struct.pack("<I", encoded.tell()) + encoded.getvalue()
