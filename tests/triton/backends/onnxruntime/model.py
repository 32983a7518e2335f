"""Triton's onnxruntime backend, as far as a test needs it, written for its Python backend.

The server in the wheel of `nvidia-pytriton` has no other backend. This one takes the same
repository: it computes `default_model_filename` with onnxruntime, on the CPU.
"""

import json
from pathlib import Path

import onnxruntime
import triton_python_backend_utils as triton


class TritonPythonModel:
    def initialize(self, args):
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"], args["model_version"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        file = folder / (config["default_model_filename"] or "model.onnx")
        self.session = onnxruntime.InferenceSession(
            str(file), options, providers=["CPUExecutionProvider"]
        )
        self.inputs = [entry["name"] for entry in config["input"]]
        self.outputs = [entry["name"] for entry in config["output"]]

    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        feed = {
            name: triton.get_input_tensor_by_name(request, name).as_numpy() for name in self.inputs
        }
        results = self.session.run(self.outputs, feed)
        return triton.InferenceResponse(
            [triton.Tensor(*pair) for pair in zip(self.outputs, results, strict=True)]
        )
