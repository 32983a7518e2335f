import importlib
import math
import warnings

import pytest
import torch

from coat_deploy.train.recipe import PRESETS, Recipe, get_preset
from coat_deploy.train.schedule import BASE_IMAGES, Schedule, average_decay

STEPS = 7
SHAPES = [
    {"epochs": 30, "warmup_epochs": 5.0, "warmup_factor": 5e-4, "final_factor": 5e-3},
    {"epochs": 10, "warmup_epochs": 0.0, "warmup_factor": 0.5, "final_factor": 0.01},
    {"epochs": 10, "warmup_epochs": 2.5, "warmup_factor": 0.1, "final_factor": 0.0},
    {"epochs": 3, "warmup_epochs": 1.0, "warmup_factor": 0.0, "final_factor": 1.0},
]


def schedule(images=256, steps=STEPS, **fields):
    return Schedule(Recipe().replace(fields), images, steps)


def rates(ours):
    return [ours.learning_rate(step) for step in range(ours.steps)]


def lengths(ours):
    """Steps of the warm-up, and intervals between the steps of the cosine."""
    warmup = round(ours.recipe.warmup_epochs * ours.steps_per_epoch)
    return warmup, ours.steps - 1 - warmup


def optimiser(rate):
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=rate)


@pytest.mark.parametrize("fields", SHAPES)
def test_rates_are_timms_at_every_step(timm, fields):
    """Of `CosineLRScheduler` in steps, with its cosine counted from the end of the warm-up.

    The authors' scripts count it from the first epoch, and change the rate once an epoch.
    """
    ours = schedule(**fields)
    warmup, falling = lengths(ours)
    theirs = importlib.import_module("timm.scheduler").CosineLRScheduler(
        optimiser(ours.peak),
        t_initial=falling,
        lr_min=ours.peak * ours.recipe.final_factor,
        warmup_t=warmup,
        warmup_lr_init=ours.peak * ours.recipe.warmup_factor,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    expected = []
    for step in range(ours.steps):
        theirs.step_update(step)
        expected.append(theirs.optimizer.param_groups[0]["lr"])
    assert rates(ours) == pytest.approx(expected, rel=1e-6, abs=1e-15)


@pytest.mark.parametrize("fields", SHAPES)
def test_rates_are_torchs_at_every_step(fields):
    ours = schedule(**fields)
    warmup, falling = lengths(ours)
    sgd = optimiser(ours.peak)
    # LinearLR cannot start from 0, and needs a step.
    start = max(ours.recipe.warmup_factor, 1e-300)
    rising = torch.optim.lr_scheduler.LinearLR(sgd, start, total_iters=max(warmup, 1))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(
        sgd, falling, eta_min=ours.peak * ours.recipe.final_factor
    )
    phases = [rising, cosine] if warmup else [cosine]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own use of its own deprecated argument
        theirs = torch.optim.lr_scheduler.SequentialLR(sgd, phases, [warmup] if warmup else [])
        expected = []
        for _ in range(ours.steps):
            expected.append(sgd.param_groups[0]["lr"])
            sgd.step()
            theirs.step()
    assert rates(ours) == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_the_peak_grows_with_the_images_of_a_step():
    assert schedule(images=BASE_IMAGES, learning_rate=3e-4).peak == 3e-4
    assert schedule(images=4 * BASE_IMAGES, learning_rate=3e-4).peak == pytest.approx(12e-4)


def test_the_authors_rates_come_of_their_batch():
    """Their scripts: 8 processes of 256, warm-up from 1e-6, 5e-4 * 2048 / 512, down to 1e-5."""
    ours = Schedule(get_preset("imagenet"), 8 * 256, 625)
    found = rates(ours)
    assert found[0] == pytest.approx(1e-6)
    assert max(found) == found[5 * 625] == pytest.approx(2e-3)
    assert found[-1] == pytest.approx(1e-5)


def test_a_final_factor_of_1_keeps_the_rate_constant():
    ours = Schedule(get_preset("finetune-384"), 8 * 32, STEPS)
    assert rates(ours) == pytest.approx([5e-6] * ours.steps, rel=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
def test_rates_rise_then_fall_in_every_preset(preset):
    found = rates(Schedule(get_preset(preset), 64, STEPS))
    top = found.index(max(found))
    assert found[: top + 1] == sorted(found[: top + 1])
    assert found[top:] == sorted(found[top:], reverse=True)
    assert all(rate > 0 and math.isfinite(rate) for rate in found)


@pytest.mark.parametrize(("epochs", "warmup", "steps"), [(1, 0.0, 1), (1, 1.0, 1), (2, 2.0, 3)])
def test_the_shortest_trainings_have_rates(epochs, warmup, steps):
    ours = schedule(epochs=epochs, warmup_epochs=warmup, steps=steps, warmup_factor=0.1)
    found = rates(ours)
    assert all(0 < rate <= ours.peak for rate in found)


def test_the_averages_decay_is_timms_warm_up_shifted_by_an_update(timm):
    """(1 + n) / (10 + n) = 1 - (1 + (n + 1) / 9)^-1: `ModelEmaV3` with gamma 9 and power 1."""
    network = torch.nn.Linear(1, 1)
    theirs = timm.utils.ModelEmaV3(
        network, decay=0.99, use_warmup=True, warmup_gamma=9, warmup_power=1
    )
    for updates in range(2000):
        # It takes off one step before it counts, and its first one is ours after it.
        assert average_decay(updates, 0.99) == pytest.approx(theirs.get_decay(updates + 2))
    assert average_decay(0, 0.99) == 0.1 and average_decay(1999, 0.99) == 0.99
