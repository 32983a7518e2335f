"""The network in PyTorch: on the CPU the reference of every artifact, on a GPU a contender."""

import contextlib
import importlib.metadata
import importlib.util
import os
import shutil
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from coat_deploy.backends.pixels import accept
from coat_deploy.errors import BackendMissing, DeviceMissing, RunnerError
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


def missing() -> str | None:
    """Return the command that installs what is lacking, or None."""
    lacking = any(importlib.util.find_spec(name) is None for name in ("torch", "safetensors"))
    return 'pip install "coat-deploy[torch]"' if lacking else None


def version() -> str:
    """Return PyTorch's version."""
    return importlib.metadata.version("torch")


def require_compiler(user: str = "torch.compile") -> None:
    """Raise BackendMissing unless there is the C++ compiler that PyTorch calls for `user`."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if sys.platform != "win32" and shutil.which(compiler) is None:
        raise BackendMissing(
            f"{user}: its C++ compiler is not installed (expected {compiler}). "
            "Install it (Debian, Ubuntu: apt install g++), or name another in CXX."
        )


def require_for(options: LoadOptions, target: str = "eager") -> None:
    """Raise unless this machine has what `options` ask for, before anything is loaded.

    `target`: in whose name errors speak.

    Raises: BackendMissing where `torch.compile` has no compiler, or fused kernels on a GPU no
    Triton; DeviceMissing where PyTorch has no GPU.
    """
    if options.compile:
        require_compiler("torch.compile" if target == "eager" else target)
    if options.device != "cuda":
        return
    import torch

    if not torch.cuda.is_available():
        raise DeviceMissing(f"{target}: PyTorch {torch.__version__} finds no NVIDIA GPU.")
    if options.fused and importlib.util.find_spec("triton") is None:
        raise BackendMissing(f"{target}: the fused kernels need Triton. Run: pip install triton")


def forbid_tf32() -> None:
    """Have float32 be float32 on a GPU, in the whole process.

    PyTorch lets cuDNN cut what convolutions multiply to TF32's ten bits, unless told otherwise: on
    an H200 logits of coat_tiny were then 3e-3 off.
    """
    import torch

    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False


def keep_float32(options: LoadOptions) -> None:
    """Forbid TF32 where fp32 was asked for on a GPU."""
    if options.device == "cuda" and options.precision == "fp32":
        forbid_tf32()


def load(path: Path, options: LoadOptions) -> "EagerRunner":
    """Load the model folder `path` in evaluation mode.

    Raises: SpecError, WeightsError as the folder's files deserve; BackendMissing, DeviceMissing as
    `require_for`.
    """
    require_for(options)
    return EagerRunner(load_network(path, options.features), options)


def load_network(path: Path, features: bool) -> Any:
    """Return the network of the model folder `path`, in evaluation mode, on the CPU.

    Raises: SpecError, WeightsError as the folder's files deserve.
    """
    import torch

    from coat_deploy.model import Model
    from coat_deploy.network.coat import create_network
    from coat_deploy.network.weights import fit, read_safetensors

    model = Model(path)
    tensors = fit(read_safetensors(model.weights_path), model.spec)
    network = create_network(
        model.spec.architecture,
        model.spec.num_classes,
        features=features,
        **model.spec.model_args,
    )
    state = {key: torch.from_numpy(value) for key, value in tensors.items()}
    # Without its head the network leaves the head's weights over.
    network.load_state_dict(state, strict=not features)
    return network.eval()


def _fused(network: Any, dtype: Any) -> Any:
    """Return `network` with fused operators and, unless `dtype` is None, weights of that type."""
    from coat_deploy.network.fused.fuse import fuse, lower

    network = fuse(network)
    return lower(network, dtype) if dtype else network


class _CallingThread(threading.local):
    """What belongs to a thread that calls the network: PyTorch's numbers of threads do, too."""

    def __init__(self) -> None:
        self.prepared = False
        self.recorded: dict[str, Array] = {}


class EagerRunner(Closing):
    """Runs the network; `taps` are recorded by hooks on its blocks.

    Streams are concurrent calls of the one network, each with a team of threads of its own.
    """

    target = "eager"

    def __init__(self, network: Any, options: LoadOptions) -> None:
        import torch

        self._torch = torch
        self._threads = options.stream_threads
        self._calling = _CallingThread()
        self._prepare_thread()
        self._taps = options.taps
        self._device = options.device
        keep_float32(options)
        self._dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(options.precision)
        self._fused = options.fused
        if self._fused:
            network = _fused(network, self._dtype)
        self._network = network.to(self._device)
        self._hooks = [
            module.register_forward_hook(self._recorder(path))
            for path, module in network.named_modules()
            if any(tap.rpartition(".")[0] == path for tap in self._taps)
        ]
        self._step = torch.compile(self._network) if options.compile else self._network
        size = ("height", "width")
        self.inputs: tuple[TensorSpec, ...] = (TensorSpec(INPUT, "float32", ("batch", 3, *size)),)
        names = FEATURES if options.features else (LOGITS,)
        self.outputs = tuple(TensorSpec(name, "float32", ("batch",)) for name in names)

    def close(self) -> None:
        """Free the network and take its hooks off."""
        for hook in self._hooks:
            hook.remove()
        del self._network, self._step

    def _compute(self, pixels: Any) -> Any:
        """Run the network on a float32 tensor of its device."""
        torch, cast = self._torch, contextlib.nullcontext()
        if self._fused and self._dtype:
            pixels = pixels.to(self._dtype)
        elif self._dtype:
            cast = torch.autocast(self._device, self._dtype)
        with torch.inference_mode(), cast:
            return self._step(pixels)

    def _prepare_thread(self) -> None:
        """Give the calling thread its share: a new thread begins with OpenMP's own number."""
        if self._threads and not self._calling.prepared:
            self._torch.set_num_threads(self._threads)
            self._calling.prepared = True

    def _recorder(self, path: str) -> Callable[[Any, Any, Any], None]:
        """Return a hook that keeps a block's output as image and class token, like the graphs."""

        def record(_module: Any, _inputs: Any, output: Any) -> None:
            tokens: dict[str, Any] = {}
            if path.startswith("patch_embed"):
                tokens["image"] = output[0]
            elif path.startswith("parallel_blocks"):
                for scale, x in enumerate(output, start=2):
                    tokens[f"image{scale}"], tokens[f"cls{scale}"] = x[:, 1:], x[:, 0]
            else:
                tokens["image"], tokens["cls"] = output[:, 1:], output[:, 0]
            for name, value in tokens.items():
                self._calling.recorded[f"{path}.{name}"] = value.float().cpu().numpy().copy()

        return record

    def run(self, pixels: Pixels) -> Mapping[str, Array]:
        """Return the outputs and taps by name. Raises RunnerError when PyTorch fails."""
        pixels = accept(pixels, self.inputs[0], self.target)
        self._prepare_thread()
        recorded: dict[str, Array] = {}
        self._calling.recorded = recorded
        try:
            output = self._compute(self._torch.from_numpy(pixels).to(self._device))
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise RunnerError(f"eager: {reason} (input {pixels.shape}).") from error
        outputs = output if isinstance(output, tuple) else (output,)
        named = {
            spec.name: value.float().cpu().numpy()
            for spec, value in zip(self.outputs, outputs, strict=True)
        }
        for tap in self._taps:
            if tap not in recorded:
                raise RunnerError(f"eager: the network has no inner tensor '{tap}'.")
        return named | {tap: recorded[tap] for tap in self._taps}

    def bind(self, pixels: Pixels) -> Callable[[], object]:
        """Return a step that runs `pixels`."""
        pixels = accept(pixels, self.inputs[0], self.target)
        tensor = self._torch.from_numpy(pixels).to(self._device)

        def step() -> object:
            self._prepare_thread()
            output = self._compute(tensor)
            if self._device == "cuda":  # which answers before it has computed
                self._torch.cuda.synchronize()
            return output

        return step
