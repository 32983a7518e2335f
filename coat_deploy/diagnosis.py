"""What there is to know about an installation: what works, what is lacking, what mends it.

It reads and asks, and changes nothing. Runtimes are imported in processes of their own: a broken
binary package can end a process or hang it, and this one has to live to tell.
"""

import importlib.metadata
import os
import re
import shlex
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from coat_deploy.backends import eager
from coat_deploy.backends.select import TARGETS, backend
from coat_deploy.cache import default_cache_dir
from coat_deploy.errors import BackendMissing, CoatDeployError
from coat_deploy.finding import Finding, Level
from coat_deploy.gpu_diagnosis import examine_gpu, gather
from coat_deploy.import_apart import import_apart
from coat_deploy.machine import UNKNOWN, Machine, describe
from coat_deploy.repository import MODELS_VARIABLE, Repository
from coat_deploy.version import __version__

LITTLE_SPACE_BYTES = 1 << 30
"""The largest CoaT writes 180 MB of weights and as much a graph, beside those they replace."""

MODULES = {
    "eager": ("torch", "safetensors"),
    "onnxruntime": ("onnxruntime",),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "cuda.bindings.runtime"),
    "tensorrt-rtx": ("tensorrt_rtx", "cuda.bindings.runtime"),
    "aotinductor": ("torch", "safetensors"),
}
"""The modules that a target cannot do without."""

OWNERS = {
    "onnxruntime": (
        *("onnxruntime", "onnxruntime-gpu", "onnxruntime-directml", "onnxruntime-openvino"),
        *("onnxruntime-training", "ort-nightly", "ort-nightly-gpu"),
    ),
    "openvino": ("openvino", "openvino-nightly"),
}
"""Packages that install one and the same module; two at once overwrite each other's files."""

_EXTRAS = {
    "torch": "exporting and validating",
    "train": "training",
    "datasets": "training data of Hugging Face datasets",
    "plot": "the charts of bench",
}
# The first of each row that the processor has is told.
_MATRIX_UNITS = (
    (
        ("amx_bf16", "OpenVINO bf16 runs on matrix units and is much faster than fp32"),
        ("avx512_bf16", "OpenVINO computes bf16, without matrix units"),
    ),
    (
        ("avx512f", "fp32 sixteen numbers at a time"),
        ("avx2", "fp32 eight numbers at a time"),
        ("neon", "fp32 four numbers at a time"),
    ),
)


@dataclass(frozen=True)
class TargetState:
    """Whether a target can be used; if not, `error` says why and `command` mends it.

    `installed` but not `usable` is broken. `versions` are the modules' own, as imported.
    """

    target: str
    installed: bool
    usable: bool
    versions: Mapping[str, str] = field(default_factory=dict)
    error: str | None = None
    command: str | None = None


@dataclass(frozen=True)
class Diagnosis:
    """Everything found, in the order in which a person would ask."""

    findings: tuple[Finding, ...]
    machine: Machine
    targets: tuple[TargetState, ...]

    @property
    def healthy(self) -> bool:
        """Whether there is no problem."""
        return all(finding.level != "problem" for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Return findings, the machine, and the targets by name."""
        return {
            "findings": [asdict(finding) for finding in self.findings],
            "machine": self.machine.to_json(),
            "targets": {state.target: asdict(state) for state in self.targets},
        }


def diagnose(models: Path | None = None) -> Diagnosis:
    """Examine the installation, the machine and the folders; `models` as for `Repository.open`."""
    machine = describe()
    installed = {name: v for row in OWNERS.values() for name in row if (v := _installed(name))}
    clashes = dict(find_clashes(installed, bool(machine.gpus)))
    with ThreadPoolExecutor() as pool:
        states = tuple(pool.map(lambda target: examine_target(target, clashes), TARGETS))
    try:
        requirements = importlib.metadata.requires("coat-deploy") or []
    except importlib.metadata.PackageNotFoundError:  # run from a checkout
        requirements = []
    findings = (
        Finding("ok", "python", f"{machine.python} at {sys.executable}"),
        Finding("ok", "coat-deploy", f"{__version__} at {Path(__file__).parent}"),
        *examine_packages(requirements),
        *examine_machine(machine),
        *examine_compiler(),
        *clashes.values(),
        *examine_gpu(gather(machine)),
        *examine_targets(states, machine),
        *examine_folders(Repository.open(models)),
    )
    return Diagnosis(findings, machine, states)


def _installed(package: str) -> str | None:
    """Return the version of an installed package; a damaged record of one counts as none."""
    try:
        return importlib.metadata.version(package) or None
    except (importlib.metadata.PackageNotFoundError, KeyError):
        return None


def find_clashes(
    installed: Mapping[str, str], has_gpu: bool = False
) -> Iterator[tuple[str, Finding]]:
    """Yield every module that two of the `installed` packages (name to version) both own."""
    for module, owners in OWNERS.items():
        there = [name for name in owners if name in installed]
        if len(there) < 2:
            continue
        extra = "openvino" if module == "openvino" else "cpu"
        if has_gpu and "onnxruntime-gpu" in there:
            extra = "gpu"
        named = " and ".join(f"{name} {installed[name]}" for name in there)
        what = f"{named} overwrite each other's module {module}; which one runs is chance"
        # Removing one alone takes files of the other with it.
        command = f"pip uninstall --yes {' '.join(there)} && {_install(extra)}"
        yield module, Finding("problem", "clash", what, command)


def _install(extra: str) -> str:
    return f'pip install "coat-deploy[{extra}]"'


def examine_packages(requirements: Sequence[str]) -> Iterator[Finding]:
    """Yield what is there of our `requirements`, lines such as 'torch>=2.7; extra == "torch"'."""
    present: dict[str, str] = {}
    lacking: dict[str, list[str]] = {}
    for line in requirements:
        found = re.fullmatch(r"""([\w.-]+)>=([\d.]+)(?:; extra == ["'](\w+)["'])?""", line)
        if not found or found[3] == "dev":
            continue
        package, least, extra = found.groups()
        version = _installed(package)
        if version is None:
            lacking.setdefault(extra, []).append(package)
            continue
        present[package] = version
        if _release(version) < _release(least):
            command = f"pip install --upgrade {shlex.quote(f'{package}>={least}')}"
            yield Finding("problem", package, f"{version} is too old ({least} needed)", command)
    if present:
        listed = ", ".join(f"{name} {version}" for name, version in present.items())
        yield Finding("ok", "packages", listed)
    for extra, purpose in _EXTRAS.items():
        if extra in lacking:
            what = f"{', '.join(lacking[extra])} not installed, needed for {purpose}"
            yield Finding("note", f"extra {extra}", what, _install(extra))


def _release(version: str) -> tuple[int, ...]:
    """Return the numbers a version begins with; a pre-release counts as its release."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def examine_machine(machine: Machine) -> Iterator[Finding]:
    """Yield processor, what its features give, memory and GPUs."""
    cores = "" if machine.cores is None else f"{machine.cores} cores, "
    quota = f", limited to {machine.cpu_quota:g} CPUs" if machine.cpu_quota else ""
    yield Finding("ok", "processor", f"{machine.cpu}: {cores}{machine.threads} threads{quota}")
    yield _features(machine)
    memory = f"{machine.memory_mib / 1024:.1f} GiB" if machine.memory_mib else UNKNOWN
    yield Finding("ok", "memory", memory)
    for gpu in machine.gpus:
        size = f", {gpu.memory_mib / 1024:.0f} GiB" if gpu.memory_mib else ""
        yield Finding("ok", "gpu", f"{gpu.name}{size}, driver {gpu.driver}")
    if not machine.gpus and shutil.which("nvidia-smi"):
        yield Finding("note", "gpu", "nvidia-smi is there but tells of no GPU", "nvidia-smi")
    elif not machine.gpus:
        yield Finding("ok", "gpu", "none, and none is needed")


def examine_compiler() -> Iterator[Finding]:
    """Yield whether there is the C++ compiler that PyTorch calls, where PyTorch is there."""
    if backend("eager").missing():
        return
    try:
        eager.require_compiler("compiling for aotinductor and eager:compile")
    except BackendMissing as error:
        yield Finding("note", "compiler", str(error), "apt install g++")
    else:
        yield Finding("ok", "compiler", "a C++ compiler for aotinductor and eager:compile")


def _features(machine: Machine) -> Finding:
    has = machine.cpu_features
    told = [next((unit for unit in row if unit[0] in has), None) for row in _MATRIX_UNITS]
    parts = [f"{name}: {gives}" for name, gives in filter(None, told)]
    if not has:
        return Finding("note", "cpu features", f"{UNKNOWN}: the system does not tell them")
    if told[1] is None:
        parts.append("neither AVX2 nor NEON: every target is slow here")
        return Finding("note", "cpu features", "; ".join(parts))
    if told[0] is None and told[1][0] != "neon":
        parts.append("no AMX or AVX512-BF16: OpenVINO takes fp32 artifacts only")
    return Finding("ok", "cpu features", "; ".join(parts))


def examine_target(target: str, clashes: Mapping[str, Finding]) -> TargetState:
    """Return whether `target` works; `clashes` by module tell what breaks it, if it does not."""
    command = backend(target).missing()
    if command:
        return TargetState(target, False, False, error="not installed", command=command)
    versions, error = import_apart(MODULES[target])
    if error is None:
        return TargetState(target, True, True, versions)
    failed = next((name for name in MODULES[target] if name not in versions), target)
    if failed in clashes:
        command = clashes[failed].command
    else:
        owners = OWNERS.get(failed, (failed,))
        package = next((name for name in owners if _installed(name)), failed)
        command = f"pip install --force-reinstall {package}"
    error = f"{failed} does not import: {error}"
    return TargetState(target, True, False, versions, error, command)


def examine_targets(states: Sequence[TargetState], machine: Machine) -> Iterator[Finding]:
    """Yield each target's state, and the problem of having none that works."""
    for state in states:
        subject = f"target {state.target}"
        if state.usable:
            named = ", ".join(f"{name} {v.split('-')[0]}" for name, v in state.versions.items())
            yield Finding("ok", subject, f"usable, {named}")
        else:
            level: Level = "problem" if state.installed else "note"
            yield Finding(level, subject, state.error or UNKNOWN, state.command)
        torch = state.versions.get("torch", "") if state.target == "eager" else ""
        if "+cu" in torch and not machine.gpus:
            what = f"{torch} is built for CUDA; it works, but a CPU build is gigabytes smaller"
            yield Finding("note", "torch", what)
    if not any(state.usable for state in states):
        broken = (state.command for state in states if state.installed)
        command = next(filter(None, broken), _install("cpu"))
        yield Finding("problem", "targets", "none is usable: no model can run", command)


def examine_folders(repository: Repository) -> Iterator[Finding]:
    """Yield where models are read from and written to, the models there, and the cache."""
    value = os.environ.get(MODELS_VARIABLE)
    if value and value.startswith("~"):
        what = f"{value}: the ~ is taken literally; it was not expanded by a shell"
        mend = f"export {MODELS_VARIABLE}={shlex.quote(str(Path(value).expanduser()))}"
        yield Finding("problem", MODELS_VARIABLE, what, mend)
    else:
        yield Finding("ok", MODELS_VARIABLE, value or "not set")
    yield _folder("models written to", repository.writable, MODELS_VARIABLE)
    roots = dict.fromkeys(root.absolute() for root in repository.roots)
    named = [f"{root}{'' if os.path.isdir(root) else ' (does not exist)'}" for root in roots]
    yield Finding("ok", "models read from", ", then ".join(named))
    yield from _models(repository)
    yield _folder("cache", default_cache_dir(), "COAT_CACHE")


def _folder(subject: str, folder: Path, variable: str) -> Finding:
    """Return whether files can be put into `folder`, and how many; nothing is tried."""
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    mend = f'export {variable}="$HOME/coat-{"cache" if subject == "cache" else "models"}"'
    if not nearest.is_dir():
        return Finding("problem", subject, f"{folder}: {nearest} is no folder", mend)
    if not os.access(nearest, os.W_OK | os.X_OK):
        return Finding("note", subject, f"{folder}: not writable, only read", mend)
    free = shutil.disk_usage(nearest).free
    made = "" if folder == nearest else ", made when first needed"
    what = f"{folder}: writable{made}, {free / 2**30:.1f} GiB free"
    if free < LITTLE_SPACE_BYTES:
        return Finding("note", subject, f"{what}: little for a model and its artifacts", mend)
    return Finding("ok", subject, what)


def _models(repository: Repository) -> Iterator[Finding]:
    num_weights = num_artifacts = 0
    try:
        models = repository.models()
    except OSError as error:
        yield Finding("problem", "models", f"cannot be listed ({error})")
        return
    for model in models:
        try:
            _, artifacts = model.spec, model.artifacts
        except CoatDeployError as error:
            yield Finding("problem", f"model {model.name}", str(error))
            continue
        num_weights += model.weights_path.exists()
        num_artifacts += len(artifacts)
    what = f"{len(models)} found, {num_weights} with weights, {num_artifacts} artifacts"
    yield Finding("ok", "models", f"{what} (coat-deploy models)")
