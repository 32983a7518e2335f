"""What an ONNX file says of itself: model, parents, preprocessing, labels, versions."""

import importlib.metadata
import json
from collections.abc import Sequence

from onnx import ModelProto, helper

from coat_deploy.spec import ModelSpec
from coat_deploy.version import __version__

PREFIX = "coat_deploy."


def add_metadata(
    model: ModelProto,
    spec: ModelSpec,
    labels: Sequence[str],
    weights_sha256: str,
    **choices: str,
) -> None:
    """Write into `model` what a reader who has nothing but the file needs to use it.

    `choices` are the target, precision and form it was made for. Keys begin with `PREFIX`; the
    config is the model folder's, as JSON.
    """
    entries = {
        "model": spec.architecture,
        "config": json.dumps(spec.to_json()),
        "labels": json.dumps(list(labels)),
        "weights_sha256": weights_sha256,
        "version": __version__,
        "onnx_version": importlib.metadata.version("onnx"),
        **choices,
    }
    model.producer_name, model.producer_version = "coat-deploy", __version__
    helper.set_model_props(model, {PREFIX + key: value for key, value in entries.items()})


def read_metadata(model: ModelProto) -> dict[str, str]:
    """Return the entries that `add_metadata` wrote, without their prefix."""
    return {
        entry.key.removeprefix(PREFIX): entry.value
        for entry in model.metadata_props
        if entry.key.startswith(PREFIX)
    }
