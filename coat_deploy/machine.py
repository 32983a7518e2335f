"""The machine a measurement was made on, described without importing what it describes.

Everything comes from /proc, /sys, package metadata and `nvidia-smi`; on other systems than Linux
from `platform` and `sysctl`. Nothing here fails: what cannot be found out is "unknown" or None.
"""

import dataclasses
import importlib.metadata
import math
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coat_deploy.version import __version__

UNKNOWN = "unknown"
PACKAGES = (
    "torch",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
    "tensorrt",
    "numpy",
)
COMMAND_TIMEOUT_S = 5.0

_MIB = 1 << 20
# What the kernel calls a feature, and what the runtimes' documentation calls it. Only those that
# change which matrix kernels a runtime picks.
_FEATURES = {
    "avx2": "avx2",
    "fma": "fma",
    "f16c": "f16c",
    "avx_vnni": "avx_vnni",
    "avx512f": "avx512f",
    "avx512_vnni": "avx512_vnni",
    "avx512_bf16": "avx512_bf16",
    "avx512_fp16": "avx512_fp16",
    "amx_bf16": "amx_bf16",
    "amx_int8": "amx_int8",
    "amx_fp16": "amx_fp16",
    "asimd": "neon",
    "asimdhp": "fp16",
    "asimddp": "dotprod",
    "i8mm": "i8mm",
    "bf16": "bf16",
    "sve": "sve",
    "sve2": "sve2",
}
# Those that a compiler told to use what the processor has may put anywhere, not only where a
# program asks for them.
_COMPILED = re.compile(r"avx|amx|s?sse|pni|fma|f16c|bmi|abm|popcnt|movbe|adx|gfni")


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver reports it; `memory_mib` is None where the driver does not."""

    name: str
    driver: str
    memory_mib: int | None


@dataclass(frozen=True)
class Machine:
    """Where something was measured.

    `cores` and `threads` are the physical cores and the hardware threads this process may use:
    affinity and cgroup quota counted. `cpu_quota` is the cgroup's limit in CPUs.
    `memory_mib` is the RAM, or the cgroup's limit where that is smaller.
    `versions` holds the installed ones of `PACKAGES`, and coat-deploy.
    """

    cpu: str
    cores: int | None
    threads: int
    cpu_quota: float | None
    cpu_features: tuple[str, ...]
    memory_mib: int | None
    system: str
    python: str
    versions: Mapping[str, str]
    gpus: tuple[Gpu, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        document = dataclasses.asdict(self)
        document["cpu_features"] = list(self.cpu_features)
        document["gpus"] = [dataclasses.asdict(gpu) for gpu in self.gpus]
        return document

    def summary(self) -> str:
        """Return one line for a caption: processor, cores, memory, system, GPUs."""
        cores = self.cores or self.threads
        parts = [self.cpu, f"{cores} core{'' if cores == 1 else 's'}"]
        if self.memory_mib:
            parts.append(f"{self.memory_mib / 1024:.0f} GiB")
        parts += [gpu.name for gpu in self.gpus]
        return ", ".join([*parts, self.system])


def describe(root: Path = Path("/")) -> Machine:
    """Describe this machine; `root` is the folder that holds `proc` and `sys`."""
    cpuinfo = _read(root / "proc/cpuinfo")
    usable = _usable_cpus()
    quota = _cpu_quota(root)
    limit = _limited(len(usable), quota)
    cores = _physical_cores(root, usable)
    return Machine(
        cpu=_cpu_name(cpuinfo),
        cores=None if cores is None else min(cores, limit),
        threads=limit,
        cpu_quota=quota,
        cpu_features=_cpu_features(cpuinfo),
        memory_mib=_memory_mib(root),
        system=f"{platform.system()} {platform.release()}".strip() or UNKNOWN,
        python=platform.python_version(),
        versions=_versions(),
        gpus=_gpus(),
    )


def usable_threads(root: Path = Path("/")) -> int:
    """Return how many hardware threads this process may use: affinity and cgroup quota counted."""
    return _limited(len(_usable_cpus()), _cpu_quota(root))


def instruction_sets(root: Path = Path("/")) -> tuple[str, ...]:
    """Return the processor's instructions that compilers use, sorted, as the kernel names them.

    Of an Arm processor all that the kernel tells; none where it tells nothing (not Linux).
    """
    cpuinfo = _read(root / "proc/cpuinfo")
    arm = _field(cpuinfo, "Features").split()
    x86 = [flag for flag in _field(cpuinfo, "flags").split() if _COMPILED.match(flag)]
    return tuple(sorted({*arm, *x86}))


def cpu_name(root: Path = Path("/")) -> str:
    """Return the name of the processor, or "unknown"."""
    return _cpu_name(_read(root / "proc/cpuinfo"))


def resident_memory_mib() -> float | None:
    """Return this process's resident memory; None where the system does not tell (not Linux)."""
    return _status_mib("VmRSS")


def peak_memory() -> tuple[float | None, str | None]:
    """Return this process's largest resident memory so far in MiB, and where the figure is from.

    Linux carries ru_maxrss over from the process that started this one, so a small process shows
    its parent's peak; VmHWM begins anew. ru_maxrss serves elsewhere, nothing on Windows.
    """
    if (peak := _status_mib("VmHWM")) is not None:
        return peak, "VmHWM"
    try:
        import resource
    except ImportError:
        return None, None
    peak = float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    return (peak / _MIB if sys.platform == "darwin" else peak / 1024), "ru_maxrss"


def largest_cache_mib(root: Path = Path("/")) -> float | None:
    """Return the size of the first CPU's largest cache; None where the system does not tell."""
    units = {"K": 1 / 1024, "M": 1.0, "G": 1024.0}
    sizes = []
    for file in (root / "sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = _read(file).strip()
        if text[:-1].isdigit() and text[-1] in units:
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes, default=None)


def _status_mib(name: str) -> float | None:
    for line in _read(Path("/proc/self/status")).splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) / 1024
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _run(*command: str) -> str:
    """Return what a command prints; nothing when it is absent, fails or takes too long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout


def _field(cpuinfo: str, *names: str) -> str:
    """Return the first value among /proc/cpuinfo's lines `name : value`."""
    for line in cpuinfo.splitlines():
        key, _, value = line.partition(":")
        if key.strip() in names and value.strip():
            return value.strip()
    return ""


def _cpu_name(cpuinfo: str) -> str:
    name = _field(cpuinfo, "model name")
    if not name and (part := _field(cpuinfo, "CPU part")):
        name = f"ARM implementer {_field(cpuinfo, 'CPU implementer')} part {part}"
    if not name and platform.system() == "Darwin":
        name = _run("sysctl", "-n", "machdep.cpu.brand_string").strip()
    return name or platform.processor() or platform.machine() or UNKNOWN


def _cpu_features(cpuinfo: str) -> tuple[str, ...]:
    flags = set(_field(cpuinfo, "flags", "Features").split())
    if not flags and platform.machine() in ("arm64", "aarch64"):
        flags = {"asimd"}  # part of the architecture
    return tuple(name for flag, name in _FEATURES.items() if flag in flags)


def _usable_cpus() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _limited(usable: int, quota: float | None) -> int:
    return usable if quota is None else min(usable, max(1, math.ceil(quota)))


def _physical_cores(root: Path, usable: tuple[int, ...]) -> int | None:
    """Count the cores behind the usable hardware threads; None where the kernel does not say."""
    folder = root / "sys/devices/system/cpu"
    siblings = {_read(folder / f"cpu{n}/topology/thread_siblings_list") for n in usable}
    return None if "" in siblings else len(siblings)


def _cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders whose limits bind this process, innermost first; cgroups v1 and v2."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        mount = root / "sys/fs/cgroup"
        if controllers:
            if controller not in controllers.split(","):
                continue
            mount /= controller
        folder = mount / path.lstrip("/")
        yield folder
        for parent in folder.parents:
            if not parent.is_relative_to(mount):
                break
            yield parent


def _cpu_quota(root: Path) -> float | None:
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        words = _read(folder / "cpu.max").split() or [
            _read(folder / "cpu.cfs_quota_us").strip(),
            _read(folder / "cpu.cfs_period_us").strip(),
        ]
        # No limit reads "max" in v2 and -1 in v1.
        if len(words) == 2 and words[0].isdigit() and words[1].isdigit() and int(words[1]):
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def _memory_mib(root: Path) -> int | None:
    sizes = []
    for line in _read(root / "proc/meminfo").splitlines():
        if line.startswith("MemTotal:"):
            sizes.append(int(line.split()[1]) * 1024)
    if not sizes:
        try:
            sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
        except (AttributeError, ValueError, OSError):  # Windows has no sysconf
            return None
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            limit = _read(folder / name).strip()
            if limit.isdigit():
                sizes.append(int(limit))
    return min(sizes) // _MIB


def _versions() -> dict[str, str]:
    versions = {"coat-deploy": __version__}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _gpus() -> tuple[Gpu, ...]:
    table = _run(
        "nvidia-smi",
        "--query-gpu=name,driver_version,memory.total",
        "--format=csv,noheader,nounits",
    )
    gpus = []
    for line in table.splitlines():
        cells = [cell.strip() for cell in line.split(",")]
        if len(cells) == 3:
            memory = int(cells[2]) if cells[2].isdigit() else None
            gpus.append(Gpu(cells[0], cells[1], memory))
    return tuple(gpus)
