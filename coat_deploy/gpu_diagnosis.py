"""What keeps packages from the GPU: libraries not found, a driver too old, versions that part ways.

Everything is read from packages' records and files, but that libraries are loaded: in a process of
its own, since a broken one can end it.
"""

import importlib.metadata
import importlib.util
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from coat_deploy.backends.onnxruntime_tensorrt import LIBRARY as TENSORRT_PROVIDER
from coat_deploy.backends.onnxruntime_tensorrt import linked
from coat_deploy.finding import Finding
from coat_deploy.machine import Machine
from coat_deploy.shared_library import needed

CUDA_PROVIDER = "libonnxruntime_providers_cuda.so"

DRIVERS = {11: (450, 80), 12: (525, 60), 13: (580, 65)}
"""The oldest driver of each major version of CUDA. Source: NVIDIA, CUDA compatibility."""

PACKAGES = (
    "onnxruntime", "onnxruntime-gpu", "torch", "tensorrt", "tensorrt-cu12", "tensorrt-cu13",
    "tensorrt-rtx-cu12", "tensorrt-rtx-cu13",
)  # fmt: skip

DRIVERS_LIBRARY = "libcuda.so.1"
LATER = ("libcudnn.so.9",)
"""Libraries that onnxruntime loads when it first needs them."""

_CUDA = re.compile(r"lib(cuda|cudart|cublas|cublasLt|cudnn|cufft|curand|nvrtc)\.so\.\d+")
_LOAD_TIMEOUT_S = 60.0
_PROBE = """import contextlib, ctypes, sys
with contextlib.suppress(Exception), contextlib.redirect_stdout(sys.stderr):
    import onnxruntime
    onnxruntime.preload_dlls()
for name in sys.argv[1:]:
    try:
        ctypes.CDLL(name)
    except OSError:
        print("missing", name, flush=True)
"""


@dataclass(frozen=True)
class Facts:
    """What there is: versions by package, and of onnxruntime-gpu what its libraries need.

    `driver`: of the first GPU, None without one. `missing`: CUDA's libraries that do not load.
    """

    driver: str | None
    versions: Mapping[str, str] = field(default_factory=dict)
    cuda_needs: tuple[str, ...] = ()
    tensorrt_needs: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()


def gather(machine: Machine) -> Facts:
    """Find out the facts of this installation."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name) or "0"
        except (importlib.metadata.PackageNotFoundError, KeyError):
            continue
    driver = machine.gpus[0].driver if machine.gpus else None
    spec = importlib.util.find_spec("onnxruntime") if "onnxruntime-gpu" in versions else None
    if spec is None or not spec.origin:
        return Facts(driver, versions)
    folder = Path(spec.origin).parent / "capi"
    needs = tuple(name for name in needed(folder / CUDA_PROVIDER) if _CUDA.fullmatch(name))
    wanted = (*needs, *LATER) if needs else ()
    missing = unloadable(wanted)
    return Facts(driver, versions, needs, needed(folder / TENSORRT_PROVIDER), missing)


def unloadable(names: Sequence[str]) -> tuple[str, ...]:
    """Return those of the libraries that do not load, after onnxruntime's own search for them."""
    if not names:
        return ()
    command = [sys.executable, "-P", "-c", _PROBE, *names]
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=_LOAD_TIMEOUT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return ()
    lines = [line.split() for line in done.stdout.splitlines()]
    return tuple(words[1] for words in lines if len(words) == 2 and words[0] == "missing")


def examine_gpu(facts: Facts) -> Iterator[Finding]:
    """Yield what keeps packages from the GPU, each with what mends it."""
    yield from _libraries(facts)
    yield from _drivers(facts)
    yield from _plain_onnxruntime(facts)
    yield from _provider(facts)


def _libraries(facts: Facts) -> Iterator[Finding]:
    version = facts.versions.get("onnxruntime-gpu")
    of_packages = [name for name in facts.missing if name != DRIVERS_LIBRARY]
    if version and of_packages:
        what = f"{version} does not find {', '.join(of_packages)}; it cannot use a GPU"
        command = f'pip install "onnxruntime-gpu[cuda,cudnn]=={version}"'
        yield Finding("problem" if facts.driver else "note", "onnxruntime-gpu", what, command)
    if version and facts.driver and DRIVERS_LIBRARY in facts.missing:
        what = f"{DRIVERS_LIBRARY} is not found, though there is driver {facts.driver}"
        yield Finding("problem", "driver", what, "sudo ldconfig")


def _drivers(facts: Facts) -> Iterator[Finding]:
    """Yield the packages that are built for a CUDA which the driver is too old for."""
    for package, major in _built_for(facts):
        least = DRIVERS.get(major)
        have = _release(facts.driver or "")
        if not facts.driver or least is None or not have or have >= least:
            continue
        what = (
            f"driver {facts.driver} is too old for CUDA {major}, which {package} "
            f"{facts.versions[package]} is built for ({'.'.join(map(str, least))} needed)"
        )
        yield Finding("problem", f"driver for {package}", what, _mend(package, major, have))


def _built_for(facts: Facts) -> Iterator[tuple[str, int]]:
    for name in facts.cuda_needs:
        if name.startswith("libcudart.so."):
            yield "onnxruntime-gpu", int(name.rpartition(".")[2])
    if found := re.search(r"\+cu(\d\d)", facts.versions.get("torch", "")):
        yield "torch", int(found[1])
    for package in facts.versions:
        if found := re.fullmatch(r"tensorrt(?:-rtx)?-cu(\d\d)", package):
            yield package, int(found[1])


def _mend(package: str, major: int, have: tuple[int, ...]) -> str:
    """Return the command: TensorRT comes for the older CUDA too; all else takes a newer driver."""
    if package == "tensorrt-cu13" and have >= DRIVERS[12]:
        gone = "tensorrt tensorrt-cu13 tensorrt-cu13-libs tensorrt-cu13-bindings"
        return f"pip uninstall --yes {gone} && pip install tensorrt-cu12"
    return f"sudo apt-get install --yes nvidia-driver-{DRIVERS[major][0]}"


def _plain_onnxruntime(facts: Facts) -> Iterator[Finding]:
    versions = facts.versions
    if facts.driver and "onnxruntime" in versions and "onnxruntime-gpu" not in versions:
        what = f"onnxruntime {versions['onnxruntime']} computes on the processor alone"
        command = 'pip uninstall --yes onnxruntime && pip install "coat-deploy[gpu]"'
        yield Finding("note", "onnxruntime-gpu", what, command)


def _provider(facts: Facts) -> Iterator[Finding]:
    """Yield a TensorRT that is not the one that onnxruntime's provider was built for."""
    major, names = linked(facts.tensorrt_needs), ("tensorrt", "tensorrt-cu13", "tensorrt-cu12")
    there = next((facts.versions[name] for name in names if name in facts.versions), None)
    if major is None or there is None or _release(there)[:1] == (major,):
        return
    what = f"onnxruntime's takes TensorRT {major}, and {there} is installed; target tensorrt works"
    command = f'pip install "tensorrt>={major},<{major + 1}"'
    yield Finding("note", "provider tensorrt", what, command)


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)(?:\.(\d+))?", version)
    return tuple(int(part) for part in found.groups() if part) if found else ()
