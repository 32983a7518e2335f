"""PyTorch's ways: eager with autocast or weights of a low type, compiled, also ahead of time."""

import functools
import importlib.util
import itertools
from collections.abc import Callable, Sequence
from typing import Any

from coat_deploy.backends.eager import forbid_tf32, require_compiler
from coat_deploy.errors import BackendMissing
from coat_deploy.gpu_report.networks import images, in_torch
from coat_deploy.gpu_report.timing import Step
from coat_deploy.gpu_report.way import Opened, Place, Way
from coat_deploy.runner import Array, Pixels

Forward = Callable[[Any], Any]
"""From float32 pixels on the device to logits."""


class TorchOpened:
    """A function of PyTorch on a device."""

    def __init__(self, forward: Forward, device: str) -> None:
        import torch

        self._torch, self._forward, self._device = torch, forward, device

    def logits(self, pixels: Pixels) -> Array:
        """Return the logits of images, float32."""
        with self._torch.inference_mode():
            found = self._forward(self._torch.from_numpy(pixels).to(self._device))
        values: Array = found.float().cpu().numpy()
        return values

    def bind(self, inputs: Sequence[Pixels]) -> Step:
        """Return a step on inputs that lie on the device and take turns."""
        torch = self._torch
        turns = itertools.cycle([torch.from_numpy(pixels).to(self._device) for pixels in inputs])

        def launch() -> object:
            with torch.inference_mode():
                return self._forward(next(turns))

        on_gpu = self._device == "cuda"
        return Step(launch, torch.cuda.synchronize if on_gpu else _nothing, events=on_gpu)

    def memory_mib(self) -> float | None:
        """Return the most that PyTorch's allocator held."""
        if self._device != "cuda":
            return None
        return float(self._torch.cuda.max_memory_reserved()) / 2**20


def _nothing() -> None:
    """Wait for nothing: a CPU answers when it is done."""


def dtype_of(precision: str) -> Any:
    """Return PyTorch's type of a precision."""
    import torch

    return {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]


def open_eager(precision: str, variant: str, place: Place) -> Opened:
    """Open the network as it is; autocast where the precision is a low one."""
    network = in_torch(variant, place.device)
    if precision == "fp32":
        forbid_tf32()
        return TorchOpened(network, place.device)
    import torch

    dtype = dtype_of(precision)

    def forward(pixels: Any) -> Any:
        with torch.autocast(place.device, dtype):
            return network(pixels)

    return TorchOpened(forward, place.device)


def _low(precision: str, variant: str, place: Place) -> tuple[Any, Any]:
    """Return the network with weights of a low type, and the type."""
    dtype = dtype_of(precision)
    return in_torch(variant, place.device).to(dtype), dtype


def open_low(precision: str, variant: str, place: Place) -> Opened:
    """Open the network with weights of a low type."""
    network, dtype = _low(precision, variant, place)
    return TorchOpened(lambda pixels: network(pixels.to(dtype)), place.device)


def open_compiled(mode: str, precision: str, variant: str, place: Place) -> Opened:
    """Compile the network with weights of a low type, anew for each shape."""
    import torch

    network, dtype = _low(precision, variant, place)
    compiled: Any = torch.compile(network, mode=mode, dynamic=False)
    return TorchOpened(lambda pixels: compiled(pixels.to(dtype)), place.device)


def open_ahead(precision: str, variant: str, place: Place) -> Opened:
    """Compile the network ahead of time for any batch, by AOTInductor, and load the package."""
    import torch

    network, dtype = _low(precision, variant, place)
    example = torch.from_numpy(images(variant, 2)).to(place.device, dtype)
    batch = torch.export.Dim("batch", min=1, max=4096)
    path = place.folder / f"{variant}-{precision}.pt2"
    with torch.no_grad():
        program = torch.export.export(network, (example,), dynamic_shapes=({0: batch},))
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))
    load: Any = torch._inductor.aoti_load_package
    package = load(str(path))
    return TorchOpened(lambda pixels: package(pixels.to(dtype)), place.device)


def no_torch(device: str) -> str | None:
    """Return why PyTorch cannot compute there, or None; PyTorch is not imported."""
    return None if importlib.util.find_spec("torch") else "torch is not installed"


def no_compiler(device: str) -> str | None:
    """Return why PyTorch cannot compile for a device, or None."""
    if reason := no_torch(device):
        return reason
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if device == "cpu":
        return "left out of a dry run: a compiler for CPUs says nothing of a GPU"
    try:
        require_compiler()
    except BackendMissing as error:
        return str(error)
    return None


def _way(name: str, precision: str, function: Any, *arguments: str, **fields: Any) -> Way:
    opened = functools.partial(function, *arguments, precision)
    return Way(f"{name} {precision}", precision, opened, fields.pop("missing", no_torch), **fields)


BASELINE = "eager fp32"


def torch_ways() -> list[Way]:
    """Return PyTorch's ways, the most wanted first."""
    ways = [_way("eager", "fp32", open_eager), _way("eager amp", "fp16", open_eager)]
    for precision in ("fp16", "bf16"):
        if precision == "bf16":
            ways.append(_way("eager amp", "bf16", open_eager))
        ways.append(_way("eager half", precision, open_low, checked=False))
        for mode, most in (("reduce-overhead", 90.0), ("max-autotune", 180.0)):
            ways.append(
                _way(
                    f"compile {mode}", precision, open_compiled, mode,
                    missing=no_compiler, checked=False, least_s=40.0, most_s=most,
                )
            )  # fmt: skip
        ways.append(
            _way(
                "AOTInductor", precision, open_ahead,
                missing=no_compiler, checked=False, least_s=40.0, most_s=120.0,
            )
        )  # fmt: skip
    return ways
