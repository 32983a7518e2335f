"""What must work, and stay quick, without the heavy packages."""

import subprocess
import sys

import pytest

HEAVY = (
    "torch", "onnx", "onnxruntime", "openvino", "numpy", "PIL", "safetensors", "matplotlib",
    "ray", "pyarrow",
)  # fmt: skip
COMMANDS = (
    "", "export", "validate", "evaluate", "bench", "predict", "selftest", "triton", "kserve",
    "doctor", "models list",
)  # fmt: skip

BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names!r}:
            raise ImportError(f"{{name}} is blocked")
sys.meta_path.insert(0, Blocked())
{code}
"""


def run(code: str, blocked: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    program = BLOCK.format(names=set(blocked), code=code)
    command = [sys.executable, "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_needs_no_heavy_package(command):
    code = f"sys.argv = ['coat-deploy', *{command.split()!r}, '--help']\n"
    code += "from coat_deploy.cli.app import main; main()"
    done = run(code, HEAVY)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_public_names_are_those_promised():
    import coat_deploy

    assert coat_deploy.__all__ == ["__version__", "create_network"]
    assert coat_deploy.create_network("coat_lite_toy", num_classes=3).num_classes == 3
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = coat_deploy.nothing


@pytest.mark.parametrize(
    "module",
    [
        "repository", "open", "evaluate", "images", "backends.onnxruntime", "measure.validate",
        "measure.bench", "triton.repository", "classifier", "labelling.cluster",
    ],
)  # fmt: skip
def test_running_an_artifact_needs_no_torch(module):
    done = run(f"import coat_deploy.{module}", ("torch", "onnx", "safetensors"))
    assert done.returncode == 0, done.stderr


def test_labelling_here_needs_no_ray():
    code = "import coat_deploy.labelling.local, coat_deploy.labelling.folder"
    done = run(f"{code}, coat_deploy.labelling.cluster", ("torch", "ray", "pandas"))
    assert done.returncode == 0, done.stderr


def test_package_without_torch_says_how_to_install_it():
    code = (
        "from coat_deploy.backends.select import require\n"
        "from coat_deploy.errors import BackendMissing\n"
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda n, p=None: None if n == 'torch' else found(n, p)\n"
        "try: require('eager')\n"
        "except BackendMissing as error: print(error)"
    )
    done = run(code, ("torch",))
    assert 'pip install "coat-deploy[torch]"' in done.stdout, done.stderr
