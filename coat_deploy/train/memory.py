"""What to say when memory runs out: the batch size that would fit, found by trying."""

import gc

import torch
from torch import nn

from coat_deploy.errors import TrainingError
from coat_deploy.spec import Size

_SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "bad_alloc")


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a lack of memory: PyTorch has no one class for it on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def out_of_memory(network: nn.Module, size: Size, batch_size: int) -> TrainingError:
    """Return the error for a batch that does not fit, with the largest half of it that does.

    Runs the network on ever smaller batches; its gradients are lost.
    """
    network.zero_grad(set_to_none=True)
    fits = batch_size // 2
    while fits and not _fits(network, size, fits):
        fits //= 2
    advice = (
        f"A batch of {fits} fits: set batch_size to {fits} and accumulate to "
        f"{-(-batch_size // fits)} for the same steps, or turn gradient_checkpointing on."
        if fits
        else "Not even one image fits: choose a smaller size or variant."
    )
    return TrainingError(
        f"training: out of memory with batches of {batch_size} images of {size[0]}x{size[1]}. "
        f"{advice}"
    )


def _fits(network: nn.Module, size: Size, batch_size: int) -> bool:
    device = next(network.parameters()).device
    try:
        network(torch.zeros((batch_size, 3, *size), device=device)).sum().backward()
        fits = True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    network.zero_grad(set_to_none=True)
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fits
