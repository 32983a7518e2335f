"""What keeps packages from the GPU, with facts that are made up."""

import importlib.util
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from coat_deploy import gpu_diagnosis
from coat_deploy.finding import Finding
from coat_deploy.gpu_diagnosis import Facts, examine_gpu, unloadable
from coat_deploy.machine import Gpu, describe

NEEDS = ("libcublas.so.13", "libcudart.so.13", "libcuda.so.1")
SOUND = Facts("580.95.05", {"onnxruntime-gpu": "1.31.1"}, NEEDS, ("libnvinfer.so.10",))


def only(facts: Facts) -> Finding:
    (finding,) = examine_gpu(facts)
    return finding


def test_where_all_fits_there_is_nothing_to_say() -> None:
    assert list(examine_gpu(SOUND)) == []
    assert list(examine_gpu(Facts(None))) == []


@pytest.mark.parametrize(("driver", "level"), [("580.95.05", "problem"), (None, "note")])
def test_libraries_that_are_not_found_are_installed_with_the_package(driver, level) -> None:
    missing = ("libcublas.so.13", "libcudnn.so.9", *(("libcuda.so.1",) if driver is None else ()))
    found = only(replace(SOUND, driver=driver, missing=missing))
    assert (found.level, found.subject) == (level, "onnxruntime-gpu")
    assert found.what.startswith("1.31.1 does not find libcublas.so.13, libcudnn.so.9;")
    assert found.command == 'pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"'


def test_the_drivers_own_library_is_not_a_packages() -> None:
    found = only(replace(SOUND, missing=("libcuda.so.1",)))
    assert (found.level, found.subject, found.command) == ("problem", "driver", "sudo ldconfig")


@pytest.mark.parametrize(
    ("package", "version", "needs"),
    [
        ("onnxruntime-gpu", "1.31.1", NEEDS),
        ("torch", "2.11.0+cu130", ()),
        ("tensorrt-rtx-cu13", "1.7.1", ()),
    ],
)
def test_a_driver_too_old_for_a_packages_cuda_is_told(package, version, needs) -> None:
    found = only(Facts("570.86.15", {package: version}, needs))
    assert found.level == "problem"
    assert found.what == (
        f"driver 570.86.15 is too old for CUDA 13, which {package} {version} is built for "
        "(580.65 needed)"
    )
    assert found.command == "sudo apt-get install --yes nvidia-driver-580"


def test_a_torch_for_the_processor_asks_nothing_of_the_driver() -> None:
    assert list(examine_gpu(Facts("470.1", {"torch": "2.13.0+cpu"}))) == []


def test_a_driver_that_is_new_enough_by_its_minor_version_will_do() -> None:
    assert list(examine_gpu(Facts("525.60.13", {"torch": "2.7.0+cu126"}))) == []
    assert only(Facts("525.5", {"torch": "2.7.0+cu126"})).level == "problem"


def test_tensorrt_for_an_older_cuda_serves_an_older_driver() -> None:
    found = only(Facts("570.86.15", {"tensorrt": "11.4.0", "tensorrt-cu13": "11.4.0"}))
    assert found.subject == "driver for tensorrt-cu13"
    assert found.command.endswith("&& pip install tensorrt-cu12")


def test_an_onnxruntime_without_cuda_beside_a_gpu_is_a_note() -> None:
    found = only(Facts("580.95.05", {"onnxruntime": "1.32.0"}))
    assert (found.level, found.subject) == ("note", "onnxruntime-gpu")
    assert found.command == 'pip uninstall --yes onnxruntime && pip install "coat-deploy[gpu]"'


def test_another_tensorrt_than_onnxruntimes_provider_takes_is_a_note() -> None:
    versions = {**SOUND.versions, "tensorrt": "11.4.0"}
    found = only(replace(SOUND, versions=versions))
    assert found.level == "note"
    assert found.what.startswith("onnxruntime's takes TensorRT 10, and 11.4.0 is installed")
    assert list(examine_gpu(replace(SOUND, versions={**versions, "tensorrt": "10.14.1"}))) == []


@pytest.mark.skipif(sys.platform != "linux", reason="names of Linux's libraries")
def test_libraries_are_loaded_in_another_process(tmp_path: Path) -> None:
    assert unloadable(("libc.so.6", "libnothing.so.99")) == ("libnothing.so.99",)
    assert unloadable(()) == ()


def test_a_library_that_ends_or_holds_its_process_is_survived(monkeypatch) -> None:
    def hang(*args: object, **options: object) -> None:
        raise subprocess.TimeoutExpired("python", 60)

    monkeypatch.setattr(subprocess, "run", hang)
    assert unloadable(("libc.so.6",)) == ()


def test_facts_are_read_from_the_package_that_is_installed(monkeypatch, tmp_path) -> None:
    machine = replace(describe(), gpus=(Gpu("NVIDIA H200", "580.95.05", 143771),))
    versions = {"onnxruntime-gpu": "1.31.1"}
    monkeypatch.setattr(gpu_diagnosis.importlib.metadata, "version", versions.__getitem__)
    spec = SimpleNamespace(origin=str(tmp_path / "onnxruntime" / "__init__.py"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: spec)
    libraries = {
        gpu_diagnosis.CUDA_PROVIDER: ("libcudart.so.13", "libc.so.6"),
        gpu_diagnosis.TENSORRT_PROVIDER: ("libnvinfer.so.10",),
    }
    monkeypatch.setattr(gpu_diagnosis, "needed", lambda path: libraries[path.name])
    monkeypatch.setattr(gpu_diagnosis, "unloadable", lambda names: names[-1:])
    assert gpu_diagnosis.gather(machine) == Facts(
        "580.95.05", versions, ("libcudart.so.13",), ("libnvinfer.so.10",), ("libcudnn.so.9",)
    )


def test_an_installation_without_onnxruntime_gpu_starts_no_process(monkeypatch) -> None:
    machine = describe()
    monkeypatch.setattr(gpu_diagnosis, "unloadable", None)
    monkeypatch.setattr(
        gpu_diagnosis.importlib.metadata, "version", {"onnxruntime": "1.32.0"}.__getitem__
    )
    assert gpu_diagnosis.gather(machine).versions == {"onnxruntime": "1.32.0"}
