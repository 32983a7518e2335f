import pytest
import torch
from torch import nn

from coat_deploy.errors import TrainingError
from coat_deploy.train import memory
from coat_deploy.train.memory import is_out_of_memory, out_of_memory

SIZE = (4, 6)


class Narrow(nn.Module):
    """A network that refuses batches of more than `most` images, forward or backward."""

    def __init__(self, most, when="forward", error=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.most, self.when, self.tried = most, when, []
        self.error = error or RuntimeError("DefaultCPUAllocator: can't allocate memory: you ...")

    def forward(self, pixels):
        self.tried.append(tuple(pixels.shape))
        result = pixels.mean((2, 3)) @ self.weight
        if len(pixels) > self.most:
            if self.when == "forward":
                raise self.error
            result.register_hook(self.fail)
        return result

    def fail(self, gradient):
        raise self.error


@pytest.mark.parametrize("when", ["forward", "backward"])
def test_the_largest_half_that_fits_is_found_by_trying(when):
    network = Narrow(9, when)
    error = out_of_memory(network, SIZE, 64)
    assert isinstance(error, TrainingError)
    assert "batches of 64 images of 4x6; 8 would fit" in str(error)
    assert "Set batch_size to 8 and accumulate to 8 times what it is" in str(error)
    assert network.tried == [(n, 3, *SIZE) for n in (32, 16, 8)]


def test_batches_that_do_not_halve_evenly_make_steps_at_least_as_large():
    assert "batch_size to 3 and accumulate to 3 times" in str(out_of_memory(Narrow(4), SIZE, 7))


@pytest.mark.parametrize("batch", [1, 8])
def test_where_not_even_one_image_fits_that_is_said(batch):
    message = str(out_of_memory(Narrow(0), SIZE, batch))
    assert "and even of one. Choose a smaller size or variant." in message


def test_trying_leaves_no_gradient_and_the_weights():
    network = Narrow(4)
    network.weight.grad = torch.ones(3)
    out_of_memory(network, SIZE, 8)
    assert network.weight.grad is None
    assert torch.equal(network.weight, torch.ones(3))


def test_a_toy_is_tried_with_its_shared_and_all_other_parameters(toys):
    network = toys.network("coat_toy", gradient_checkpointing=True)
    assert "; 1 would fit" in str(out_of_memory(network, (32, 32), 2))


def test_trying_waits_for_no_other_process():
    """What a data-parallel engine hooks on the gradients is not called."""
    network, called = Narrow(4), []
    network.weight.register_post_accumulate_grad_hook(called.append)
    out_of_memory(network, SIZE, 8)
    assert network.tried and called == []


def test_a_sharded_network_is_not_tried(monkeypatch):
    """Its forward pass would wait for processes that have other troubles, or none."""
    monkeypatch.setattr(memory, "is_sharded", lambda network: True)
    network = Narrow(4)
    assert "Lower batch_size" in str(out_of_memory(network, SIZE, 8))
    assert network.tried == []


def test_another_error_while_trying_is_not_swallowed():
    with pytest.raises(RuntimeError, match="another"):
        out_of_memory(Narrow(4, error=RuntimeError("another")), SIZE, 16)


def test_what_the_cpu_allocator_raises_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("std::bad_alloc"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"), True),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (ValueError("out of memory"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_only_a_lack_of_memory_is_taken_for_one(error, expected):
    assert is_out_of_memory(error) is expected
