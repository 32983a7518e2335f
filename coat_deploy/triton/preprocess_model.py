"""A model of Triton's Python backend: encoded images to the network's input.

This file is copied into the repository as `model.py`, with the part of coat_deploy that it imports
beside it. Images are prepared as the config's parameter `preprocess` says; one that cannot be read
is answered with an error, and the others of other requests are not.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class TritonPythonModel:
    """What Triton looks for in a `model.py`."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read how to prepare images."""
        # Before the packages that are installed: pixels are those of this very copy.
        sys.path.insert(0, str(Path(__file__).parent))
        import triton_python_backend_utils

        from coat_deploy.errors import ImageError
        from coat_deploy.images import load
        from coat_deploy.spec import Preprocess

        config = json.loads(args["model_config"])
        fields = json.loads(config["parameters"]["preprocess"]["string_value"])
        for name in ("input_size", "mean", "std"):
            fields[name] = tuple(fields[name])
        self._how = Preprocess(**fields)
        self._triton, self._load, self._refused = triton_python_backend_utils, load, ImageError

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Return a response a request, in order."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Any) -> Any:
        triton = self._triton
        encoded = triton.get_input_tensor_by_name(request, "image").as_numpy().ravel()
        try:
            pixels = [
                self._load(bytes(image), self._how, name=f"image {i}")
                for i, image in enumerate(encoded)
            ]
        except self._refused as error:
            reason = triton.TritonError(str(error), triton.TritonError.INVALID_ARG)
            return triton.InferenceResponse(output_tensors=[], error=reason)
        return triton.InferenceResponse([triton.Tensor("pixels", np.stack(pixels))])
