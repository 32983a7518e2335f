"""The processes and the device of a training, as Accelerate sets them up.

One process on one device by default; several when started by `accelerate launch` or `torchrun`.
"""

import warnings

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.train.recipe import Recipe

DEVICES = ("auto", "cpu")
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def open_processes(recipe: Recipe, device: str = "auto", threads: int | None = None) -> Accelerator:
    """Return the processes of a training with its precision; "auto" takes a GPU if there is one.

    threads: compute threads of each process; None leaves PyTorch's default, one a core.

    Raises: UsageError for another device, or fp16 on a CPU, which has no fast arithmetic for it.
    """
    if device not in DEVICES:
        raise UsageError(unknown_name("device", device, DEVICES))
    if threads:
        torch.set_num_threads(threads)
    # Values too small for normal floats slow a CPU down and mean nothing here.
    torch.set_flush_denormal(True)
    # Accelerate keeps one state a process, and would refuse a second training's precision.
    AcceleratorState._reset_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of CPU launches without Intel's extension
            return Accelerator(
                cpu=device == "cpu",
                mixed_precision=_PRECISIONS[recipe.precision],
                gradient_accumulation_steps=recipe.accumulate,
            )
    except ValueError as error:
        if recipe.precision == "fp16":
            raise UsageError("precision fp16: needs a GPU. Use bf16 or fp32 on a CPU.") from error
        raise
