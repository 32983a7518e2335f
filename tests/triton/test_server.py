"""NVIDIA's own tritonserver loads what is written, and answers as `predict` does.

The server is that of the wheel of nvidia-pytriton, which `tests/triton/make_server.sh` installs;
its onnxruntime backend is a double (`backends/`), everything else is real.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from coat_deploy.images import load
from coat_deploy.model import ArtifactQuery, Model
from coat_deploy.open import find_source, open_source
from coat_deploy.runner import LoadOptions

HERE = Path(__file__).parent
PLACE = Path(os.environ.get("COAT_TRITON_VENV", HERE.parents[1] / ".venv-triton"))
PACKAGES = PLACE / "lib" / "python3.11" / "site-packages"
SERVER = PACKAGES / "pytriton" / "tritonserver"
READY_S = 120

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (SERVER / "bin" / "tritonserver").is_file(),
        reason=f"needs a tritonserver in {PLACE}: run tests/triton/make_server.sh",
    ),
]


@pytest.fixture(scope="session")
def backends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The server's Python backend, and the double of its onnxruntime beside it."""
    folder = tmp_path_factory.mktemp("backends")
    shutil.copytree(SERVER / "backends" / "python", folder / "python")
    stub = "triton_python_backend_stub"
    shutil.copy2(SERVER / "python_backend_stubs" / "3.11" / stub, folder / "python" / stub)
    shutil.copytree(HERE / "backends" / "onnxruntime", folder / "onnxruntime")
    return folder


class Server:
    """A running tritonserver."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def wait(self) -> None:
        """Wait until every model is loaded and warmed up; fail with the log if it is not."""
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError):
                if self.ask("/v2/health/ready")[0] == 200:
                    return
            time.sleep(0.1)
        pytest.fail(f"tritonserver is not ready:\n{self.log.read_text()[-8000:]}")

    def ask(self, path: str, body: bytes | None = None, **headers: str) -> tuple[int, bytes]:
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", body, headers)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            return error.code, error.read()

    def infer(
        self, model: str, name: str, kind: str, shape: list[int], data: bytes, **output: Any
    ) -> tuple[int, Any]:
        """Send one tensor in binary; return the status and the answer, whose tensors are JSON."""
        size = {"binary_data_size": len(data)}
        document = {
            "inputs": [{"name": name, "shape": shape, "datatype": kind, "parameters": size}],
            **({"outputs": [{"name": "logits", "parameters": output}]} if output else {}),
        }
        header = json.dumps(document).encode()
        lengths = {"Inference-Header-Content-Length": str(len(header))}
        status, answer = self.ask(f"/v2/models/{model}/infer", header + data, **lengths)
        return status, json.loads(answer)

    def images(self, model: str, files: list[bytes], **output: Any) -> tuple[int, Any]:
        data = b"".join(struct.pack("<I", len(file)) + file for file in files)
        return self.infer(model, "image", "BYTES", [len(files), 1], data, **output)


@pytest.fixture
def serve(backends: Path, tmp_path: Path) -> Iterator[Callable[[Path], Server]]:
    """Start a tritonserver on a repository; it is ended afterwards."""
    with contextlib.ExitStack() as stack:

        def start(repository: Path) -> Server:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            log = stack.enter_context((tmp_path / "triton.log").open("wb"))
            # Its Python is the one that is first in PATH; libraries are in the wheel.
            environment = {
                "PATH": f"{PLACE / 'bin'}:/usr/bin:/bin",
                "LD_LIBRARY_PATH": str(PACKAGES / "nvidia_pytriton.libs"),
            }
            options = {
                "model-repository": repository,
                "backend-directory": backends,
                "http-address": "127.0.0.1",
                "http-port": port,
                "allow-grpc": "false",
                "allow-metrics": "false",
            }
            process = subprocess.Popen(
                [SERVER / "bin" / "tritonserver", *(f"--{k}={v}" for k, v in options.items())],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            stack.callback(end, process)
            server = Server(process, port, tmp_path / "triton.log")
            server.wait()
            return server

        yield start


def end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=20)


@pytest.mark.parametrize(
    "artifact",
    [
        "onnxruntime-fp32",
        "onnxruntime-fp32-dynamic",
        "onnxruntime-fp32-features",
        "onnxruntime-fp32-dynamic-features",
    ],
)
def test_a_server_loads_and_warms_up_every_kind_of_artifact(
    triton, serve, repository, models, photos, artifact
):
    assert triton("--artifact", artifact).status == 0
    server = serve(repository)
    status, index = server.ask("/v2/repository/index", b"")
    assert status == 200
    states = {entry["name"]: entry["state"] for entry in json.loads(index)}
    assert states == dict.fromkeys(("toy", "toy_preprocess", "toy_image"), "READY")
    status, answer = server.images("toy_image", [photo.read_bytes() for photo in photos])
    assert status == 200, answer
    model = Model(models / "toy")
    features = artifact.endswith("features")
    source = find_source(model, ArtifactQuery("onnxruntime", features=features))
    pixels = np.stack([load(photo, model.spec.preprocess) for photo in photos])
    with open_source(source, LoadOptions(threads=1)) as runner:
        expected = runner.run(pixels)
    assert {tensor["name"] for tensor in answer["outputs"]} == set(expected)
    for tensor in answer["outputs"]:
        values = np.array(tensor["data"], np.float32).reshape(tensor["shape"])
        np.testing.assert_allclose(values, expected[tensor["name"]], atol=1e-4)


def test_images_get_the_labels_that_predict_gives_them(
    cli, triton, serve, repository, models, photos
):
    assert triton().status == 0
    server = serve(repository)
    told = cli("predict", "toy", *photos, "--models", models, "--json").json["predictions"]
    for photo, predicted in zip(photos, told, strict=True):
        content = photo.read_bytes()
        status, answer = server.images("toy_image", [content], classification=5, binary_data=False)
        assert status == 200, answer
        (tensor,) = answer["outputs"]
        labels = [text.split(":", 2)[2] for text in tensor["data"]]
        assert labels == [entry["label"] for entry in predicted["labels"]]


def test_pixels_get_labels_too_and_any_size_where_it_is_open(
    triton, serve, repository, models, photos
):
    assert triton("--artifact", "onnxruntime-fp32-dynamic").status == 0
    server = serve(repository)
    how = Model(models / "toy").spec.preprocess.at((96, 64))
    pixels = load(photos[0], how)[None]
    words = {"classification": 10, "binary_data": False}
    status, answer = server.infer(
        "toy", "pixels", "FP32", [1, 3, 96, 64], pixels.tobytes(), **words
    )
    assert status == 200, answer
    (tensor,) = answer["outputs"]
    assert {text.split(":", 2)[2] for text in tensor["data"]} == set(
        Model(models / "toy").spec.label_names
    )


def test_a_broken_image_is_the_clients_mistake(triton, serve, repository, photos):
    assert triton().status == 0
    server = serve(repository)
    status, answer = server.images("toy_image", [photos[0].read_bytes()[:200]])
    assert status == 400
    assert "image 0: the JPEG image is damaged" in answer["error"]
    assert server.images("toy_image", [photos[0].read_bytes()])[0] == 200


def test_a_name_with_all_that_is_allowed_in_it_is_served(triton, serve, repository):
    name = "Aa0_.-" + "z" * 94
    assert triton("--as", name).status == 0
    server = serve(repository)
    assert server.ask(f"/v2/models/{name}_image/ready")[0] == 200


def test_what_the_server_left_is_no_stranger_to_the_next_run(triton, serve, repository):
    assert triton().status == 0
    serve(repository)
    assert triton("--max-batch", 4).status == 0
