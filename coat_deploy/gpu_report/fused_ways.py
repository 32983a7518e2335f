"""Our fused kernels, where this checkout and machine have them: here they are plugged in."""

import functools
import importlib
import importlib.util

from coat_deploy.backends.eager import forbid_tf32
from coat_deploy.gpu_report.networks import in_torch
from coat_deploy.gpu_report.torch_ways import TorchOpened, dtype_of, no_compiler, no_torch
from coat_deploy.gpu_report.way import Opened, Place, Way

MODULE = "coat_deploy.network.fused.fuse"
"""Has `fuse(network)`, which puts the kernels in, and `lower(network, dtype)`, after it."""

RELATIVE_LIMIT = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 1.6e-2}
"""How far from float64 they may be, relative. bf16 has three fraction bits less than fp16."""


def no_fused(device: str) -> str | None:
    """Return why there are no fused kernels, or None."""
    if reason := no_torch(device):
        return reason
    try:
        found = importlib.util.find_spec(MODULE)
    except ModuleNotFoundError:
        found = None
    if found is None:
        return f"this checkout has no {MODULE}"
    if device == "cuda" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def no_compiled_fused(device: str) -> str | None:
    """Return why what is around the kernels cannot be compiled, or None."""
    return no_fused(device) or no_compiler(device)


def open_fused(mode: str, precision: str, variant: str, place: Place) -> Opened:
    """Open the network with fused kernels; `mode` "" leaves it to them, others compile the rest."""
    import torch

    fused, dtype = importlib.import_module(MODULE), dtype_of(precision)
    network = fused.fuse(in_torch(variant, place.device))
    if precision == "fp32":
        forbid_tf32()
    else:
        network = fused.lower(network, dtype)
    if mode:
        network = torch.compile(network, mode=mode, dynamic=False)
    return TorchOpened(lambda pixels: network(pixels.to(dtype)), place.device)


def fused_ways() -> list[Way]:
    """Return the ways with fused kernels, the most wanted first."""
    ways = []
    for precision in ("fp16", "bf16", "fp32"):
        opened = functools.partial(open_fused, "", precision)
        limit = RELATIVE_LIMIT[precision]
        ways.append(Way(f"fused {precision}", precision, opened, no_fused, relative_limit=limit))
        if precision != "fp32":
            compiled = functools.partial(open_fused, "reduce-overhead", precision)
            ways.append(
                Way(
                    f"fused and compiled {precision}", precision, compiled, no_compiled_fused,
                    checked=False, least_s=30.0, most_s=90.0,
                )
            )  # fmt: skip
    return ways
