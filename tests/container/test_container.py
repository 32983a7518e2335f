"""The image for CPUs, built and run for real where there is a Docker daemon."""

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from coat_deploy.images import normalise
from coat_deploy.measure.proof import probe_images
from coat_deploy.model import ArtifactQuery, Model
from coat_deploy.open import find_source, open_source
from coat_deploy.runner import Array, LoadOptions, Pixels

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "coat-deploy:test"
MAX_IMAGE_BYTES = 450e6
HARDENED = ("--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges")
NUM_REQUESTS = 40

pytestmark = pytest.mark.slow


def docker(*words: str, timeout: float = 60, check: bool = True) -> str:
    done = subprocess.run(
        ["docker", *words], capture_output=True, text=True, timeout=timeout, check=False
    )
    assert done.returncode == 0 or not check, f"docker {words[0]}: {done.stderr[-2000:]}"
    return done.stdout.strip()


@pytest.fixture(scope="module")
def image() -> str:
    """The image, built of this checkout."""
    if shutil.which("docker") is None:
        pytest.skip("needs docker: eval $(tests/container/daemon.sh up FOLDER) makes one")
    if subprocess.run(["docker", "info"], capture_output=True, check=False).returncode:
        pytest.skip("needs a Docker daemon: eval $(tests/container/daemon.sh up FOLDER)")
    environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
    built = subprocess.run(
        ["docker", "build", "--network", "host", "--tag", IMAGE, "--target", "serve-cpu", "."],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert built.returncode == 0, built.stderr[-4000:]
    return IMAGE


@contextlib.contextmanager
def serving(
    image: str, models: Path, options: Sequence[str], command: Sequence[str] = ()
) -> Iterator[str]:
    """Run the image on a folder of models; yield the container's id when it is healthy."""
    mounted = ("--volume", f"{models}:/models:ro")
    container = docker("run", "--detach", *HARDENED, *mounted, *options, image, *command)
    try:
        wait_healthy(container)
        yield container
    finally:
        docker("rm", "--force", container)


def wait_healthy(container: str, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        state = json.loads(docker("inspect", "--format", "{{json .State}}", container))
        if state["Health"]["Status"] == "healthy":
            return
        if not state["Running"]:
            break
        time.sleep(0.2)
    pytest.fail(f"not healthy: {docker('logs', container)[-2000:]}")


def pixels_of(model: Model, count: int) -> Pixels:
    how = model.spec.preprocess
    return normalise(probe_images(how.input_size, count), how.mean, how.std)


@dataclass(frozen=True)
class Served:
    """A container that serves a model, and what the artifact alone makes of some pixels."""

    container: str
    model: str
    pixels: Pixels
    logits: Array
    jpeg: bytes

    def address(self, port: int) -> str:
        """Return where a port of the container is reached."""
        return docker("port", self.container, str(port)).splitlines()[0]


@pytest.fixture(scope="module")
def served(image, toy_models) -> Iterator[Served]:
    """The image, serving over HTTP and gRPC."""
    model = Model(toy_models / "coat_lite_toy")
    pixels = pixels_of(model, 2)
    with open_source(find_source(model, ArtifactQuery("onnxruntime")), LoadOptions()) as runner:
        logits = runner.run(pixels)["logits"]
    (photo,) = probe_images((90, 120), 1)
    jpeg = io.BytesIO()
    Image.fromarray(photo.transpose(1, 2, 0)).save(jpeg, "JPEG")
    published = ("--publish", "127.0.0.1::8000", "--publish", "127.0.0.1::8001")
    with serving(image, toy_models, published) as container:
        yield Served(container, model.name, pixels, logits, jpeg.getvalue())


def test_it_is_small_and_holds_no_pytorch(image) -> None:
    assert int(docker("image", "inspect", "--format", "{{.Size}}", image)) < MAX_IMAGE_BYTES
    listed = docker("run", "--rm", "--entrypoint", "python3", image, "-c",
                    "import importlib.util as u; print([u.find_spec(n) is not None"
                    " for n in ('torch', 'onnx', 'onnxruntime')])")  # fmt: skip
    assert listed == "[False, False, True]"


def test_it_runs_as_nobody_special(image) -> None:
    assert docker("run", "--rm", "--entrypoint", "id", image, "-u") == "10001"


def test_it_serves_read_only_and_answers_as_the_artifact_does(served) -> None:
    for protocol, port in (("http", 8000), ("grpc", 8001)):
        client = pytest.importorskip(f"tritonclient.{protocol}")
        wanted = client.InferInput("pixels", list(served.pixels.shape), "FP32")
        wanted.set_data_from_numpy(served.pixels)
        with client.InferenceServerClient(served.address(port)) as server:
            answer = server.infer(served.model, [wanted]).as_numpy("logits")
        np.testing.assert_allclose(answer, served.logits, atol=1e-4)


def test_it_labels_an_image_for_hugging_faces_client_curl_and_python(served) -> None:
    hub = pytest.importorskip("huggingface_hub")
    url = f"http://{served.address(8000)}/models/{served.model}"
    labels = hub.InferenceClient(model=url).image_classification(served.jpeg)
    expected = [(item.label, item.score) for item in labels]
    assert len(expected) == 5 and expected == sorted(expected, key=lambda item: -item[1])
    with urllib.request.urlopen(urllib.request.Request(url, served.jpeg), timeout=30) as answer:
        answers = [answer.read()]
    if shutil.which("curl"):
        words = ["curl", "--silent", "--fail", "--max-time", "30", "--data-binary", "@-", url]
        asked = subprocess.run(words, input=served.jpeg, capture_output=True, check=True)
        answers.append(asked.stdout)
    for text in answers:
        assert [(item["label"], item["score"]) for item in json.loads(text)] == expected


def test_stopped_it_answers_what_it_took(image, toy_models) -> None:
    model = Model(toy_models / "coat_lite_toy")
    body = pixels_of(model, 1).tobytes()

    def ask(port: int) -> str:
        connection = HTTPConnection("127.0.0.1", port, timeout=30)
        with contextlib.closing(connection):
            try:
                path = f"/v2/models/{model.name}/infer"
                connection.request("POST", path, body, {"Inference-Header-Content-Length": "0"})
                answer = connection.getresponse()
                return f"{answer.status}, {len(answer.read())} bytes"
            except OSError as error:  # refused, not dropped: the connection says so at once
                return type(error).__name__

    # On the host's own network: Docker's proxy would take connections for a server that is gone.
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    health = f"http://127.0.0.1:{port}/v2/health/ready"
    options = ("--network", "host", "--env", f"COAT_HEALTH={health}")
    command = ("serve", "--port", str(port), "--grpc-port", "0")
    with (
        serving(image, toy_models, options, command) as container,
        ThreadPoolExecutor(8) as pool,
    ):
        asked = [pool.submit(ask, port) for _ in range(NUM_REQUESTS)]
        while not any(one.done() for one in asked):
            time.sleep(0.01)
        docker("stop", "--time", "20", container)
        answers = [one.result(timeout=30) for one in asked]
        status = docker("inspect", "--format", "{{.State.ExitCode}}", container)
    answered = [answer for answer in answers if answer.startswith("200, ")]
    assert "200, 0 bytes" not in answered
    refused = [answer for answer in answers if answer == "ConnectionRefusedError"]
    assert answered and len(answered) + len(refused) == NUM_REQUESTS, Counter(answers)
    assert status == "0"
