"""How far each way is from the network in float64, and from PyTorch's own float32."""

from pathlib import Path
from typing import Any

import numpy as np

from coat_deploy.backends.eager import forbid_tf32
from coat_deploy.errors import RunnerError
from coat_deploy.gpu_report.apart import Tell
from coat_deploy.gpu_report.networks import images, in_torch
from coat_deploy.gpu_report.way import Place, Way
from coat_deploy.measure.agreement import AgreementMeter, relative
from coat_deploy.measure.bar import get_bar
from coat_deploy.measure.worker import one_line
from coat_deploy.runner import LOGITS, Array

IMAGES = 4
"""So many images of each network, in one batch."""


def make_references(tell: Tell, variants: tuple[str, ...], place: Place) -> None:
    """Write images and the logits of float32 and float64 for every variant; in a process."""
    import torch

    forbid_tf32()
    for variant in variants:
        pixels = images(variant, IMAGES)
        tensor = torch.from_numpy(pixels).to(place.device)
        network = in_torch(variant, place.device)
        with torch.inference_mode():
            single = network(tensor).cpu().numpy()
            double = network.double()(tensor.double()).cpu().numpy()
        np.savez(_file(place, variant), pixels=pixels, fp32=single, fp64=double)
        tell({"variant": variant})


def check_numbers(tell: Tell, way: Way, variants: tuple[str, ...], place: Place) -> None:
    """Tell of every variant how far a way is from its references; in a process."""
    for variant in variants:
        file = _file(place, variant)
        if not file.is_file():
            continue
        with np.load(file) as reference:
            pixels, single, double = (reference[name] for name in ("pixels", "fp32", "fp64"))
        try:
            found = way.open(variant, place).logits(pixels)
            tell({"way": way.name, "variant": variant} | compare(way, found, single, double))
        except Exception as error:  # of one variant; the others may do
            tell({"way": way.name, "variant": variant, "error": one_line(error)})


def compare(way: Way, found: Array, single: Array, double: Any) -> dict[str, Any]:
    """Return figures of logits against float64 and float32, and in what they fail."""
    if found.shape != single.shape:
        raise RunnerError(f"its logits are {found.shape} (expected {single.shape}).")
    meter = AgreementMeter()
    meter.add({LOGITS: single}, {LOGITS: found})
    agreement = meter.agreement()
    distance = relative(float(((found - double) ** 2).sum()), float((double**2).sum()))
    failures = list(get_bar(way.precision).for_few_images().failures(agreement))
    limit = way.relative_limit
    if limit is not None and not distance <= limit:
        failures.append(f"relative to float64 it is {distance:.3g}, above {limit:g}.")
    return {
        "precision": way.precision,
        "relative_to_float64": _number(distance),
        "max_abs_difference": _number(agreement.max_abs_difference),
        "centred_cosine": _number(agreement.centred_cosine_min),
        "top1_agreement": agreement.top1_agreement,
        "failures": failures,
    }


def _file(place: Place, variant: str) -> Path:
    return place.folder / f"{variant}.reference.npz"


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None
