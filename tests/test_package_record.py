from dataclasses import replace

import pytest

from coat_deploy.errors import RepositoryError
from coat_deploy.package import Host, PackageRecord

CPU = Host("2.13.0+cpu", "linux", "x86_64", "AMD EPYC", ("avx", "avx2", "fma"))
GPU = replace(CPU, torch="2.13.0+cu130", gpu="NVIDIA H100", compute_capability="9.0")
ON_CPU, ON_GPU = PackageRecord("cpu", CPU), PackageRecord("cuda", GPU)


@pytest.mark.parametrize("record", [ON_CPU, ON_GPU])
def test_a_record_is_read_as_it_was_written(record) -> None:
    assert PackageRecord.from_json(record.to_json(), "manifest.json") == record


def test_the_same_machine_is_no_other() -> None:
    assert ON_CPU.mismatch(CPU, "cpu") is None
    assert ON_GPU.mismatch(GPU, "cuda") is None


def test_more_instructions_and_a_sibling_of_the_gpu_do_no_harm() -> None:
    more = replace(CPU, instructions=(*CPU.instructions, "avx512f"))
    assert ON_CPU.mismatch(more, "cpu") is None
    assert ON_GPU.mismatch(replace(GPU, gpu="NVIDIA H200"), "cuda") is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"torch": "2.12.1"}, "compiled by PyTorch 2.13.0+cpu, and 2.12.1 is installed"),
        ({"machine": "aarch64"}, "compiled for linux x86_64, and this is linux aarch64"),
        ({"system": "darwin"}, "compiled for linux x86_64, and this is darwin x86_64"),
        (
            {"cpu": "Xeon", "instructions": ("avx",)},
            "compiled on AMD EPYC with avx2, fma, which this processor, Xeon, does not have "
            "(it has avx)",
        ),
        ({"instructions": ()}, "avx, avx2, fma, which this processor, AMD EPYC, does not have"),
    ],
)
def test_another_host_is_told_by_what_differs_with_both_values(changes, told) -> None:
    assert told in ON_CPU.mismatch(replace(CPU, **changes), "cpu")


def test_another_gpu_is_told_by_its_compute_capability() -> None:
    other = replace(GPU, gpu="NVIDIA L4", compute_capability="8.9")
    told = ON_GPU.mismatch(other, "cuda")
    assert "on NVIDIA H100 for compute capability 9.0" in told
    assert "this GPU, NVIDIA L4, has 8.9" in told


def test_another_device_is_told_first() -> None:
    assert ON_GPU.mismatch(CPU, "cpu") == "it was compiled for cuda, and --device is cpu"
    assert ON_CPU.mismatch(GPU, "cuda") == "it was compiled for cpu, and --device is cuda"


@pytest.mark.parametrize(
    "changes",
    [
        {"device": "tpu"}, {"torch": None}, {"instructions": "avx"}, {"instructions": [1]},
        {"gpu": 5}, {"more": 1},
    ],
)  # fmt: skip
def test_a_damaged_record_is_refused_with_its_file(changes) -> None:
    with pytest.raises(RepositoryError, match=r"manifest\.json: .*'package' is damaged"):
        PackageRecord.from_json(ON_CPU.to_json() | changes, "manifest.json")


def test_a_record_that_lacks_a_field_is_refused() -> None:
    entry = ON_CPU.to_json()
    del entry["cpu"]
    with pytest.raises(RepositoryError, match="is damaged"):
        PackageRecord.from_json(entry, "manifest.json")
