"""Time one way to run a network, batch after batch; in a process of its own."""

from typing import Any

from coat_deploy.gpu_report.apart import Tell
from coat_deploy.gpu_report.networks import images
from coat_deploy.gpu_report.nvml import Nvml
from coat_deploy.gpu_report.timing import measure
from coat_deploy.gpu_report.way import Place, Way
from coat_deploy.measure.worker import one_line

INPUTS = 3
"""Batches that take turns: one that lies in the caches from before would flatter."""


def time_way(tell: Tell, way: Way, variant: str, place: Place, seconds: float) -> None:
    """Tell the figures of every batch, the most wanted first; one that fails is told of."""
    nvml = Nvml(_uuid(place.device))
    before = nvml.used_mib()
    opened = way.open(variant, place)
    for batch in place.batches:
        row: dict[str, Any] = {"way": way.name, "variant": variant, "batch": batch}
        try:
            step = opened.bind([images(variant, batch, seed) for seed in range(INPUTS)])
            row |= measure(step, batch, seconds, nvml)
        except Exception as error:  # memory, of a large batch; the others may do
            tell(row | {"error": one_line(error)})
            continue
        used = nvml.used_mib()
        row["memory_mib"] = opened.memory_mib()
        row["device_memory_mib"] = None if used is None or before is None else used - before
        tell(row | {"precision": way.precision})


def _uuid(device: str) -> str | None:
    """Return what the driver calls the GPU that PyTorch uses, where PyTorch is there to tell."""
    if device != "cuda":
        return None
    try:
        import torch

        return f"GPU-{torch.cuda.get_device_properties(0).uuid}"
    except (ImportError, AttributeError, RuntimeError):
        return None
