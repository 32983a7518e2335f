"""AOTInductor: the network as PyTorch compiled it ahead of time, a package of machine code.

Compiled, it takes neither Python nor the network's code, but PyTorch, of the same version. Whoever
loads a package runs what is in it: one loads only packages that one trusts, and `open` only those
whose digest is the manifest's.
"""

import functools
import json
import platform
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coat_deploy.backends import eager
from coat_deploy.backends.pixels import accept
from coat_deploy.errors import CorruptArtifact, RepositoryError, RunnerError, UsageError
from coat_deploy.machine import cpu_name, instruction_sets
from coat_deploy.package import Host, Package, PackageRecord
from coat_deploy.runner import (
    FEATURES,
    INPUT,
    LOGITS,
    Array,
    Closing,
    LoadOptions,
    Pixels,
    TensorSpec,
)
from coat_deploy.spec import Size

TARGET = "aotinductor"
DESCRIPTION = "coat_deploy"
"""Key of a package's own metadata under which ours is, as JSON."""
MAX_METADATA_BYTES = 1 << 20

missing, version = eager.missing, eager.version


def host(device: str) -> Host:
    """Return this machine as far as packages depend on it; its GPU where `device` is "cuda"."""
    import torch

    gpu = capability = None
    if device == "cuda" and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name(0)
        capability = ".".join(map(str, torch.cuda.get_device_capability(0)))
    return Host(
        torch=str(torch.__version__),
        system=sys.platform,
        machine=platform.machine(),
        cpu=cpu_name(),
        instructions=instruction_sets(),
        gpu=gpu,
        compute_capability=capability,
    )


def require_compiler(device: str) -> None:
    """Raise unless this machine can compile packages for `device`, before any work.

    Raises: BackendMissing without a C++ compiler, or on a GPU without Triton; DeviceMissing.
    """
    fused = device == "cuda"
    eager.require_for(LoadOptions(device=device, compile=True, fused=fused), TARGET)


def build(model: Path, size: Size, options: LoadOptions) -> Package:
    """Compile the network of the model folder `model` for images of `size`, any number of them.

    On a GPU with the fused kernels, as `eager` runs it when it is `fused`: weights and tokens are
    of the precision's type throughout.
    Raises: SpecError, WeightsError as the folder's files deserve; BackendMissing, DeviceMissing as
    `require_compiler`; RunnerError when the compiler fails.
    """
    require_compiler(options.device)
    from coat_deploy.network.package import compile_package

    network = eager.load_network(model, options.features)
    if options.device == "cuda":
        network = _fused(network, options.precision)
    eager.keep_float32(options)
    network = network.to(options.device)
    record = PackageRecord(options.device, host(options.device))
    outputs = FEATURES if options.features else (LOGITS,)
    description = {"package": record.to_json(), "size": list(size), "outputs": list(outputs)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.pt2"
        try:
            compile_package(network, size, path, {DESCRIPTION: json.dumps(description)})
        except Exception as error:  # PyTorch's compilers have no class of errors of their own
            raise RunnerError(f"{TARGET}: not compiled: {_first_line(error)}") from error
        return Package(path.read_bytes(), record)


def _fused(network: Any, precision: str) -> Any:
    """Return `network` with the fused operators that any batch can take, in the precision."""
    import torch

    from coat_deploy.network.fused.fuse import fuse, lower

    network = fuse(network, feed_forward=False)
    low = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision)
    return lower(network, low) if low else network


def mismatch(record: PackageRecord, device: str) -> str | None:
    """Return in what this machine differs from those a package is for, or None."""
    return record.mismatch(host(device), device)


def load(path: Path, options: LoadOptions) -> "AotInductorRunner":
    """Load a package of ours onto its device.

    Raises: UsageError for taps; DeviceMissing without a GPU that is asked for; CorruptArtifact for
    a file that is no package of ours; RunnerError where it is not for this machine, as the package
    says itself, or PyTorch fails.
    """
    if options.taps:
        raise UsageError(f"{TARGET}: a package has no inner tensors to return.")
    description = read_description(path)
    eager.require_for(LoadOptions(device=options.device), TARGET)
    if reason := mismatch(description.record, options.device):
        raise RunnerError(f"{path}: not a package for this machine: {reason}. Export it here.")
    from torch._inductor.package.package import load_package

    eager.keep_float32(options)  # a package's cuDNN minds what its process is set to
    try:
        # As `torch._inductor.aoti_load_package`, which has but one copy of the network's memory:
        # concurrent calls would wait for each other.
        package = load_package(str(path), num_runners=options.streams)
    except Exception as error:  # of an archive, a library or a device: they share no base
        raise RunnerError(f"{path}: PyTorch does not load it: {_first_line(error)}") from error
    return AotInductorRunner(package.loader, description, options)


class Description:
    """What a package of ours says of itself."""

    def __init__(self, record: PackageRecord, size: Size, outputs: tuple[str, ...]) -> None:
        self.record, self.size, self.outputs = record, size, outputs


def read_description(path: Path) -> Description:
    """Read what a package says of itself; nothing in it is run. Raises CorruptArtifact."""
    advice = "Export it again."
    try:
        with zipfile.ZipFile(path) as archive:
            names = [n for n in archive.namelist() if n.endswith("_metadata.json")]
            with archive.open(names[0]) as file:
                metadata = json.loads(file.read(MAX_METADATA_BYTES))
        entry = json.loads(metadata[DESCRIPTION])
        record = PackageRecord.from_json(entry["package"], str(path))
        height, width = map(int, entry["size"])
        outputs = tuple(map(str, entry["outputs"]))
    except OSError as error:
        reason = error.strerror or error
        raise CorruptArtifact(f"{path}: cannot be read ({reason}). {advice}") from error
    except zipfile.BadZipFile as error:
        raise CorruptArtifact(f"{path}: not a package, or cut short ({error}). {advice}") from error
    except (IndexError, KeyError, TypeError, ValueError, zlib.error, RepositoryError) as error:
        raise CorruptArtifact(f"{path}: not a package that was exported here. {advice}") from error
    return Description(record, (height, width), outputs)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__:.300}"


class AotInductorRunner(Closing):
    """Runs a package. Loaded for k streams, it holds the network's memory k times."""

    target = TARGET

    def __init__(self, loader: Any, description: Description, options: LoadOptions) -> None:
        import torch

        self._torch, self._loader = torch, loader
        self._device, self._threads = options.device, options.stream_threads
        self._calling = threading.local()
        self._prepare_thread()
        shape = ("batch", 3, *description.size)
        self.inputs: tuple[TensorSpec, ...] = (TensorSpec(INPUT, "float32", shape),)
        self.outputs = tuple(TensorSpec(n, "float32", ("batch",)) for n in description.outputs)

    def close(self) -> None:
        """Free the network; PyTorch removes what it unpacked."""
        del self._loader

    def _prepare_thread(self) -> None:
        """Give the calling thread its share: a new thread begins with OpenMP's own number."""
        if self._threads and not hasattr(self._calling, "prepared"):
            self._torch.set_num_threads(self._threads)
            self._calling.prepared = True

    def _compute(self, pixels: Any) -> list[Any]:
        """Run the network on a float32 tensor of its device.

        By the loader itself: the object around it would parse the names of inputs at every call.
        """
        with self._torch.inference_mode():
            outputs: list[Any] = self._loader.boxed_run([pixels])
        return outputs

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return the outputs by name. Raises RunnerError when PyTorch fails."""
        pixels = accept(pixels, self.inputs[0], self.target)
        self._prepare_thread()
        try:
            outputs = self._compute(self._torch.from_numpy(pixels).to(self._device))
        except RuntimeError as error:
            reason = _first_line(error)
            raise RunnerError(f"{self.target}: {reason} (input {pixels.shape}).") from error
        return {
            spec.name: value.cpu().numpy()
            for spec, value in zip(self.outputs, outputs, strict=True)
        }

    def bind(self, pixels: Pixels) -> Callable[[], object]:
        """Return a step that runs `pixels`, from a copy on the device to outputs there."""
        pixels = accept(pixels, self.inputs[0], self.target)
        tensor = self._torch.from_numpy(pixels).to(self._device)
        return functools.partial(self._step, tensor)

    def _step(self, tensor: Any) -> object:
        self._prepare_thread()
        outputs = self._compute(tensor)
        if self._device == "cuda":  # which answers before it has computed
            self._torch.cuda.synchronize()
        return outputs
