"""What to say when memory runs out: the batch size that would fit, found by trying."""

import gc

import torch
from torch import nn

from coat_deploy.errors import TrainingError
from coat_deploy.spec import Size
from coat_deploy.train.sharding import is_sharded

_SIGNS = (
    "out of memory", "can't allocate memory", "not enough memory", "bad_alloc",
    "STATUS_ALLOC_FAILED",  # of cuBLAS and cuDNN
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error is a lack of memory: PyTorch has no one class for it on a CPU."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _SIGNS)


def out_of_memory(network: nn.Module, size: Size, batch_size: int) -> TrainingError:
    """Return the error for a batch that does not fit, with the largest half of it that does.

    Runs the network on ever smaller batches; its gradients are lost. Not one that is sharded: it
    would wait for the other processes, which have other troubles or none.
    """
    subject = f"training: out of memory with batches of {batch_size} images of {size[0]}x{size[1]}"
    if is_sharded(network):
        return TrainingError(f"{subject}. Lower batch_size, or turn gradient_checkpointing on.")
    network.zero_grad(set_to_none=True)
    fits = batch_size // 2
    while fits and not _fits(network, size, fits):
        fits //= 2
    if not fits:
        return TrainingError(f"{subject}, and even of one. Choose a smaller size or variant.")
    return TrainingError(
        f"{subject}; {fits} would fit. Set batch_size to {fits} and accumulate to "
        f"{-(-batch_size // fits)} times what it is for the same steps, or turn "
        "gradient_checkpointing on."
    )


def _fits(network: nn.Module, size: Size, batch_size: int) -> bool:
    parameters = list(network.parameters())
    device = parameters[0].device
    try:
        logits = network(torch.zeros((batch_size, 3, *size), device=device))
        # Not `backward`: of several processes it would wait for the others' gradients.
        torch.autograd.grad(logits.sum(), parameters, allow_unused=True)
        fits = True
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return fits
