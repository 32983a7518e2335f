from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType

from coat_deploy.errors import UsageError
from coat_deploy.machine import describe
from coat_deploy.train import processes
from coat_deploy.train.processes import flushing_denormals, open_processes, settle_precision


def test_one_process_on_the_cpu(toys):
    accelerator = open_processes(toys.recipe(accumulate=3), "cpu")
    assert accelerator.device.type == "cpu"
    assert (accelerator.num_processes, accelerator.process_index) == (1, 0)
    assert accelerator.gradient_accumulation_steps == 3


def test_a_second_training_may_have_another_precision(toys):
    for precision, expected in (("fp32", "no"), ("bf16", "bf16"), ("fp32", "no")):
        accelerator = open_processes(toys.recipe(precision=precision), "cpu")
        assert accelerator.mixed_precision == expected


def test_bf16_is_the_precision_of_products_and_not_of_weights(toys):
    accelerator = open_processes(toys.recipe(precision="bf16"), "cpu")
    network = torch.nn.Linear(3, 2)
    with accelerator.autocast():
        assert network(torch.ones(1, 3)).dtype == torch.bfloat16
    assert network.weight.dtype == torch.float32


@pytest.mark.parametrize(("amx", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_cpu_has_matrix_units(amx, expected, toys, monkeypatch):
    here = replace(describe(), cpu_features=("avx2", *["amx_bf16"] * amx))
    monkeypatch.setattr(processes, "describe", lambda: here)
    recipe = toys.recipe(precision="auto")
    assert settle_precision(recipe, "cpu") == toys.recipe(precision=expected)
    assert open_processes(recipe, "cpu").mixed_precision == {"fp32": "no"}.get(expected, expected)


@pytest.mark.parametrize(("has", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_bf16_where_the_gpu_computes_in_it(has, expected, toys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert settle_precision(toys.recipe(precision="auto")).precision == expected


def test_a_named_precision_is_kept(toys):
    for precision in ("fp32", "bf16", "fp16"):
        recipe = toys.recipe(precision=precision)
        assert settle_precision(recipe, "cpu") == recipe


def test_fp16_on_a_cpu_is_one_clear_line(toys):
    with pytest.raises(UsageError, match="precision fp16: needs a GPU. Use bf16 or fp32"):
        open_processes(toys.recipe(precision="fp16"), "cpu")


def test_an_unknown_device_is_refused_with_the_known_ones(toys):
    with pytest.raises(UsageError, match="unknown device 'cup' .known: auto, cpu.*'cpu'"):
        open_processes(toys.recipe(), "cup")


def test_threads_are_set_where_they_are_given(toys):
    open_processes(toys.recipe(), "cpu", threads=2)
    assert torch.get_num_threads() == 2
    open_processes(toys.recipe(), "cpu")
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_numbers_too_small_for_normal_floats_are_zero_for_a_while():
    small = torch.tensor([1e-39])
    with flushing_denormals():
        assert (small * 1).item() == 0
        with flushing_denormals():
            pass
        assert (small * 1).item() == 0
    assert (small * 1).item() != 0


@pytest.mark.parametrize(
    ("kind", "second", "accepted"),
    [
        (DistributedType.NO, False, True),
        (DistributedType.MULTI_GPU, False, True),
        (DistributedType.MULTI_CPU, False, True),
        (DistributedType.FSDP, True, True),
        (DistributedType.FSDP, False, False),
        (DistributedType.DEEPSPEED, False, False),
        (DistributedType.MEGATRON_LM, False, False),
    ],
)
def test_only_engines_that_leave_the_parameters_visible_are_accepted(
    toys, monkeypatch, kind, second, accepted
):
    cuda = torch.device("cuda")
    opened = SimpleNamespace(distributed_type=kind, is_fsdp2=second, device=cuda, num_processes=1)
    monkeypatch.setattr(processes, "Accelerator", lambda **_: opened)
    if accepted:
        assert open_processes(toys.recipe()) is opened
        return
    with pytest.raises(UsageError, match="cannot train by .*Set fsdp_version: 2"):
        open_processes(toys.recipe())
