"""The processes and the device of a training, as Accelerate sets them up.

One process on one device by default; several when started by `accelerate launch` or `torchrun`.
"""

import contextlib
import warnings
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType

from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.machine import describe
from coat_deploy.train.recipe import Recipe

DEVICES = ("auto", "cpu")
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def settle_precision(recipe: Recipe, device: str = "auto") -> Recipe:
    """Return a recipe that names its precision; "auto" is bf16 where the device is quick in it.

    That is a GPU of bf16, or a CPU with matrix units (AMX): of a training of CoaT-Lite Nano there,
    bf16 took 3/4 of the time (docs/decisions/0007-small-recipe.md). Emulated, it would cost time.
    """
    if recipe.precision != "auto":
        return recipe
    if device != "cpu" and torch.cuda.is_available():
        quick = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        quick = "amx_bf16" in describe().cpu_features
    return recipe.replace({"precision": "bf16" if quick else "fp32"})


def open_processes(recipe: Recipe, device: str = "auto", threads: int | None = None) -> Accelerator:
    """Return the processes of a training with its precision; "auto" takes a GPU if there is one.

    threads: compute threads of each process; None leaves PyTorch's default, one a core.

    Raises: UsageError for another device; fp16 on a CPU, which has no fast arithmetic for it; a
        way of sharding that is not FSDP 2.
    """
    if device not in DEVICES:
        raise UsageError(unknown_name("device", device, DEVICES))
    if threads:
        torch.set_num_threads(threads)
    recipe = settle_precision(recipe, device)
    # Accelerate keeps one state a process, and would refuse a second training's precision.
    AcceleratorState._reset_state()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of CPU launches without Intel's extension
        accelerator = Accelerator(
            # Told of no GPU, it would let processes on CPUs train apart, each for itself.
            cpu=device == "cpu" or not torch.accelerator.is_available(),
            mixed_precision=_PRECISIONS[recipe.precision],
            gradient_accumulation_steps=recipe.accumulate,
        )
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise UsageError("precision fp16: needs a GPU. Use bf16 or fp32 on a CPU.")
    _check_sharding(accelerator)
    if accelerator.num_processes > 1:
        # Gradients of depthwise windows may be laid out otherwise, which costs next to nothing.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
    return accelerator


@contextlib.contextmanager
def flushing_denormals() -> Iterator[None]:
    """Take values too small for normal floats for 0: they slow a CPU down and mean nothing here.

    Threads take it over from the one that starts them, so begin before anything is computed.
    """
    smallest = torch.full((1,), torch.finfo(torch.float32).smallest_normal)
    flushed = (smallest / 2).item() == 0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(flushed)


def _check_sharding(accelerator: Accelerator) -> None:
    """Refuse what would hide the parameters behind others: averages and checkpoints need them."""
    kind = accelerator.distributed_type
    others = (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
    if kind in others or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        name = "FSDP 1" if kind == DistributedType.FSDP else kind.value
        raise UsageError(
            f"accelerate: cannot train by {name} (expected one process, data-parallel ones or "
            "FSDP 2). Set fsdp_version: 2 in its configuration."
        )
