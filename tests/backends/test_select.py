import importlib.util
import subprocess
import sys

import pytest

from coat_deploy.backends.select import PACKAGES, PRECISIONS, TARGETS, backend, require
from coat_deploy.errors import BackendMissing, UsageError
from coat_deploy.graph.form import FORMS


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_is_a_backend_with_a_version(target: str) -> None:
    if target == "tensorrt" and backend(target).missing():
        pytest.skip("TensorRT is not installed")
    module = require(target)
    assert module.missing() is None
    assert module.version()[0].isdigit()
    assert callable(module.load)


def test_every_target_has_precisions_and_all_of_graphs_a_form() -> None:
    assert tuple(PRECISIONS) == TARGETS
    assert all(precisions[0] == "fp32" for precisions in PRECISIONS.values())
    assert {target: tuple(forms) for target, forms in FORMS.items()} == {
        target: precisions
        for target, precisions in PRECISIONS.items()
        if target not in ("eager", *PACKAGES)
    }


@pytest.mark.parametrize("find", [backend, require])
def test_an_unknown_target_suggests_the_nearest(find) -> None:
    with pytest.raises(UsageError, match=r"unknown target 'openvin'.*Did you mean 'openvino'\?"):
        find("openvin")


@pytest.mark.parametrize("name", ["select", "pixels", "../errors", "os", ""])
def test_a_module_that_is_no_backend_is_no_target(name: str) -> None:
    with pytest.raises(UsageError, match="unknown target"):
        backend(name)


@pytest.mark.parametrize(
    ("target", "package", "command"),
    [
        ("eager", "torch", 'pip install "coat-deploy[torch]"'),
        ("eager", "safetensors", 'pip install "coat-deploy[torch]"'),
        ("aotinductor", "torch", 'pip install "coat-deploy[torch]"'),
        ("onnxruntime", "onnxruntime", 'pip install "coat-deploy[cpu]"'),
        ("openvino", "openvino", 'pip install "coat-deploy[openvino]"'),
        ("tensorrt", "tensorrt", 'pip install "coat-deploy[tensorrt]"'),
        ("tensorrt-rtx", "tensorrt_rtx", 'pip install "coat-deploy[tensorrt-rtx]"'),
        ("tensorrt-rtx", "cuda", 'pip install "coat-deploy[tensorrt-rtx]"'),
    ],
)
def test_a_missing_package_says_the_command_that_installs_it(
    monkeypatch, target: str, package: str, command: str
) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else found(name, *a)
    )
    assert backend(target).missing() == command
    with pytest.raises(BackendMissing) as caught:
        require(target)
    assert str(caught.value).startswith(f"target {target}: ")
    assert str(caught.value).endswith(command)


def test_finding_backends_imports_no_runtime() -> None:
    code = (
        "import sys\n"
        "from coat_deploy.backends.select import TARGETS, backend\n"
        "[backend(target).missing() for target in TARGETS]\n"
        "heavy = {'torch', 'onnx', 'onnxruntime', 'openvino', 'tensorrt', 'tensorrt_rtx', 'cuda'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
