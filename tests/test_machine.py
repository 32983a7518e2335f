import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from coat_deploy import machine
from coat_deploy.machine import Gpu, Machine, describe, usable_threads

XEON = """processor : 0
vendor_id : GenuineIntel
model name : Intel(R) Xeon(R) Platinum 8488C
flags : fpu sse2 fma avx2 avx512f avx512_vnni avx512_bf16 amx_bf16 amx_tile amx_int8
"""
GRAVITON = """processor : 0
Features : fp asimd asimdhp asimddp sve i8mm bf16
CPU implementer : 0x41
CPU part : 0xd40
"""


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write `files` under `root`, which then stands for /."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture
def four_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)


def siblings(*pairs: str) -> dict[str, str]:
    folder = "sys/devices/system/cpu"
    return {f"{folder}/cpu{n}/topology/thread_siblings_list": p for n, p in enumerate(pairs)}


def test_an_x86_processor_is_named_with_its_matrix_units(tmp_path: Path) -> None:
    found = describe(tree(tmp_path, {"proc/cpuinfo": XEON}))
    assert found.cpu == "Intel(R) Xeon(R) Platinum 8488C"
    assert found.cpu_features == (
        *("avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8"),
    )


def test_the_largest_cache_is_found_whatever_its_unit(tmp_path: Path) -> None:
    folder = "sys/devices/system/cpu/cpu0/cache"
    sizes = {0: "48K", 1: "2048K", 2: "480M", 3: "odd"}
    root = tree(tmp_path, {f"{folder}/index{i}/size": f"{text}\n" for i, text in sizes.items()})
    assert machine.largest_cache_mib(root) == 480


def test_a_system_that_does_not_tell_its_caches_has_none(tmp_path: Path) -> None:
    assert machine.largest_cache_mib(tmp_path) is None


def test_an_arm_processor_is_named_by_its_part(tmp_path: Path) -> None:
    found = describe(tree(tmp_path, {"proc/cpuinfo": GRAVITON}))
    assert found.cpu == "ARM implementer 0x41 part 0xd40"
    assert found.cpu_features == ("neon", "fp16", "dotprod", "i8mm", "bf16", "sve")


@pytest.mark.usefixtures("four_cpus")
def test_hyper_threads_are_no_cores(tmp_path: Path) -> None:
    found = describe(tree(tmp_path, siblings("0,2", "1,3", "0,2", "1,3")))
    assert (found.cores, found.threads) == (2, 4)


@pytest.mark.usefixtures("four_cpus")
def test_a_quota_of_a_parent_group_limits_the_threads(tmp_path: Path) -> None:
    files = {
        "proc/self/cgroup": "0::/pod/container\n",
        "sys/fs/cgroup/pod/container/cpu.max": "max 100000\n",
        "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
    }
    found = describe(tree(tmp_path, files | siblings("0", "1", "2", "3")))
    assert (found.cpu_quota, found.threads, found.cores) == (1.5, 2, 2)
    assert usable_threads(tmp_path) == 2


@pytest.mark.usefixtures("four_cpus")
def test_limits_of_control_groups_version_1_count(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemTotal:       16777216 kB\n",
        "proc/self/cgroup": "4:memory:/job\n1:cpu,cpuacct:/job\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "300000\n",
        "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "2147483648\n",
    }
    found = describe(tree(tmp_path, files))
    assert (found.cpu_quota, found.threads, found.memory_mib) == (3.0, 3, 2048)


def test_a_group_without_limits_leaves_the_machine_as_it_is(tmp_path: Path) -> None:
    files = {
        "proc/meminfo": "MemFree: 1 kB\nMemTotal:       16777216 kB\n",
        "proc/self/cgroup": "0::/\n",
        "sys/fs/cgroup/memory.max": "max\n",
        "sys/fs/cgroup/cpu.max": "max 100000\n",
    }
    found = describe(tree(tmp_path, files))
    assert (found.memory_mib, found.cpu_quota) == (16384, None)


def test_nothing_to_read_is_unknown_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What a Windows offers: no /proc, no affinity, no sysconf, no names.
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.delattr(os, "sysconf", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("system", "release", "machine", "processor"):
        monkeypatch.setattr(platform, name, lambda: "")
    found = describe(tmp_path)
    assert (found.cpu, found.system) == ("unknown", "unknown")
    assert (found.cores, found.memory_mib, found.cpu_features, found.gpus) == (None, None, (), ())
    assert found.threads == os.cpu_count()


def nvidia_smi(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a shell script called nvidia-smi first on the path."""
    command = folder / "nvidia-smi"
    command.write_text(f"#!/bin/sh\n{script}\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


posix = pytest.mark.skipif(sys.platform == "win32", reason="the fake command is a shell script")


@posix
def test_gpus_are_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "NVIDIA H200, 570.86.15, 143771\nNVIDIA GB10, 580.1, [N/A]"
    nvidia_smi(tmp_path, f"echo '{lines}'", monkeypatch)
    assert describe().gpus == (
        Gpu("NVIDIA H200", "570.86.15", 143771),
        Gpu("NVIDIA GB10", "580.1", None),
    )


@posix
def test_a_failing_nvidia_smi_means_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "echo NVIDIA-SMI has failed, no driver, x; exit 9", monkeypatch)
    assert describe().gpus == ()


@posix
def test_a_hanging_nvidia_smi_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(tmp_path, "exec sleep 30", monkeypatch)
    monkeypatch.setattr(machine, "COMMAND_TIMEOUT_S", 0.2)
    start = time.monotonic()
    assert describe().gpus == ()
    assert time.monotonic() - start < 10


def test_versions_come_without_importing_the_packages() -> None:
    script = (
        "import sys; from coat_deploy.machine import PACKAGES, describe; describe();"
        "print([name for name in PACKAGES if name.replace('-', '_') in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "[]"


def test_installed_packages_are_listed_with_their_versions() -> None:
    import numpy

    assert describe().versions["numpy"] == numpy.__version__


def test_json_of_this_machine_survives_a_round_trip() -> None:
    document = describe().to_json()
    assert json.loads(json.dumps(document)) == document
    assert set(document) == {field.name for field in dataclasses.fields(Machine)}


def test_a_summary_is_one_line_about_the_hardware() -> None:
    found = Machine(
        cpu="A processor",
        cores=1,
        threads=2,
        cpu_quota=None,
        cpu_features=(),
        memory_mib=2048,
        system="Linux 6.1",
        python="3.11.7",
        versions={},
        gpus=(Gpu("NVIDIA H200", "570", 143771),),
    )
    assert found.summary() == "A processor, 1 core, 2 GiB, NVIDIA H200, Linux 6.1"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count")
def test_peak_memory_is_at_least_what_is_resident() -> None:
    peak, source = machine.peak_memory()
    resident = machine.resident_memory_mib()
    assert source == "VmHWM"
    assert peak is not None and resident is not None and peak >= resident > 1
