"""What decodes, as Triton runs it: in a process that has nothing but the repository's files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from coat_deploy.images import load
from coat_deploy.model import Model
from coat_deploy.triton.image_models import MODULES

# Triton's module, as far as model.py uses it, and its calls; -S leaves site-packages out but for
# those named, -P the working folder.
DRIVER = """
import json, sys, types
sys.path += json.loads(sys.argv[1])
import numpy as np

class Tensor:
    def __init__(self, name, array):
        self.name, self.array = name, array
    def as_numpy(self):
        return self.array

class TritonError(Exception):
    INVALID_ARG = 3
    def __init__(self, message, code):
        super().__init__(message)
        self.code = code

class Response:
    def __init__(self, output_tensors, error=None):
        self.tensors, self.error = output_tensors, error

fake = types.ModuleType("triton_python_backend_utils")
fake.Tensor, fake.TritonError, fake.InferenceResponse = Tensor, TritonError, Response
fake.get_input_tensor_by_name = lambda request, name: request[name]
sys.modules[fake.__name__] = fake

sys.path.append(sys.argv[2])
from model import TritonPythonModel
model = TritonPythonModel()
model.initialize({"model_config": sys.argv[3]})
requests = []
for paths in json.loads(sys.argv[4]):
    contents = [[open(path, "rb").read()] for path in paths]
    requests.append({"image": Tensor("image", np.array(contents, dtype=object))})
answers = model.execute(requests)
pixels = [answer.tensors[0].array for answer in answers if not answer.error]
np.savez(sys.argv[5], *pixels)
errors = [str(answer.error) if answer.error else None for answer in answers]
used = {name: module.__file__ for name, module in sys.modules.items() if "coat_deploy" in name}
print(json.dumps({"errors": errors, "modules": used}))
"""


@pytest.fixture
def decode(triton, repository, configs, tmp_path):
    """Write the repository, and run its preprocessing on requests of several files each."""
    assert triton().status == 0
    text = configs()["toy_preprocess"].parameters["preprocess"].string_value
    config = json.dumps({"parameters": {"preprocess": {"string_value": text}}})
    packages = [str(Path(np.__file__).parents[1]), *_folder_of_pillow()]

    def run(*requests):
        done = subprocess.run(
            [
                *(sys.executable, "-S", "-P", "-W", "error", "-c", DRIVER),
                *(json.dumps(packages), str(repository / "toy_preprocess" / "1"), config),
                *(json.dumps([[str(path) for path in r] for r in requests]), tmp_path / "out.npz"),
            ],
            env={"PATH": ""},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        with np.load(tmp_path / "out.npz") as arrays:
            return json.loads(done.stdout), list(arrays.values())

    return run


def _folder_of_pillow():
    import PIL

    return [str(Path(PIL.__file__).parents[1])]


def test_pixels_are_to_the_bit_those_of_the_validation(decode, models, photos):
    told, pixels = decode(photos[:1], photos[1:])
    assert told["errors"] == [None, None]
    how = Model(models / "toy").spec.preprocess
    expected = [load(photo, how) for photo in photos]
    np.testing.assert_array_equal(np.concatenate(pixels), np.stack(expected))
    assert [p.dtype for p in pixels] == [np.float32] * 2


def test_its_modules_are_those_beside_it_and_no_more(decode, repository, photos):
    told, _ = decode(photos)
    folder = str(repository / "toy_preprocess" / "1" / "coat_deploy")
    assert all(file.startswith(folder) for file in told["modules"].values())
    names = {name.partition(".")[2] for name in told["modules"]} - {""}
    assert names == set(MODULES)


def test_a_broken_image_is_an_error_of_its_request_alone(decode, photos, tmp_path):
    (tmp_path / "broken.jpg").write_bytes(photos[0].read_bytes()[:100])
    told, pixels = decode([photos[0]], [photos[1], tmp_path / "broken.jpg"], [photos[2]])
    assert [bool(error) for error in told["errors"]] == [False, True, False]
    assert told["errors"][1].startswith("image 1: the JPEG image is damaged")
    assert len(pixels) == 2


def test_the_image_to_warm_up_with_is_one(triton, repository, models):
    assert triton().status == 0
    content = (repository / "toy_preprocess" / "warmup" / "image").read_bytes()
    length = int.from_bytes(content[:4], "little")
    assert length == len(content) - 4
    assert load(content[4:], Model(models / "toy").spec.preprocess).shape == (3, 64, 96)
