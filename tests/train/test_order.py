import importlib

import numpy as np
import pytest
import torch

from coat_deploy.errors import UsageError
from coat_deploy.train.order import Order, draw_seed


def steps(order, epoch=0):
    """The images of each step, of all processes together: batch by batch, process by process."""
    processes = [order.batches(epoch, p) for p in range(order.processes)]
    batches = [np.concatenate(together) for together in zip(*processes, strict=True)]
    per_step = order.accumulate
    return [
        np.concatenate(batches[s : s + per_step]).tolist() for s in range(0, len(batches), per_step)
    ]


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_see_what_one_of_twice_the_batch_sees_step_by_step(accumulate, repeats):
    one = Order(50, 8, accumulate, 1, repeats, seed=3)
    two = Order(50, 4, accumulate, 2, repeats, seed=3)
    for epoch in range(3):
        assert steps(two, epoch) == steps(one, epoch)


def test_accumulated_batches_make_the_step_of_one_larger_batch():
    assert steps(Order(50, 4, accumulate=3)) == steps(Order(50, 12))


@pytest.mark.parametrize("images", [48, 53])
def test_an_epoch_shows_every_image_once_but_the_remainder(images):
    order = Order(images, 4, accumulate=2, processes=2)
    seen = sum(steps(order), [])
    assert len(seen) == len(set(seen)) == 48
    assert set(seen) <= set(range(images))


def test_the_remainder_is_of_other_images_each_epoch():
    order = Order(53, 16)
    left_out = [set(range(53)) - set(sum(steps(order, epoch), [])) for epoch in range(4)]
    assert all(len(images) == 5 for images in left_out)
    assert len(set.union(*left_out)) > 10


def test_every_epoch_and_seed_has_its_own_order():
    orders = [
        tuple(Order(40, 4, seed=seed).epoch(epoch)) for seed in range(3) for epoch in range(3)
    ]
    assert len(set(orders)) == 9


def test_an_order_is_a_fair_permutation():
    """Each image is equally often at each place: chi-squared over 2000 epochs."""
    counts = np.zeros((5, 5))
    order = Order(5, 1)
    for epoch in range(2000):
        counts[np.arange(5), order.epoch(epoch)] += 1
    chi_squared = ((counts - 400) ** 2 / 400).sum()
    assert chi_squared < 34.3  # 16 degrees of freedom, p = 0.005


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_repeats_show_what_timms_repeated_augmentation_shows(timm, processes, monkeypatch):
    """`RepeatAugSampler` is DeiT's: the same images in each step, from the same permutation."""
    sampler_of = importlib.import_module("timm.data.distributed_sampler").RepeatAugSampler
    order = Order(48, 24 // processes, processes=processes, repeats=3)
    permutation = np.random.default_rng([0, 0]).permutation(48).tolist()
    monkeypatch.setattr(torch, "randperm", lambda *_, **__: torch.tensor(permutation))
    theirs = [
        list(sampler_of(range(48), processes, rank, num_repeats=3, selected_round=0))
        for rank in range(processes)
    ]
    size = order.batch_size
    for step, images in enumerate(steps(order)):
        part = slice(step * size, (step + 1) * size)
        assert sorted(images) == sorted(sum((rank[part] for rank in theirs), []))


def test_repeats_keep_the_length_of_an_epoch():
    order = Order(50, 8, repeats=3)
    seen = order.epoch(0)
    assert len(seen) == 50
    images, counts = np.unique(seen, return_counts=True)
    assert len(images) == 17 and sorted(counts)[0] == 2 and set(counts) == {2, 3}


@pytest.mark.parametrize("first", range(5))
def test_resuming_at_a_step_gives_the_rest_of_the_epoch(first):
    order = Order(50, 4, accumulate=3, processes=1, seed=1)
    whole = order.batches(2, 0)
    assert len(whole) == order.steps * 3
    rest = order.batches(2, 0, first)
    assert [b.tolist() for b in rest] == [b.tolist() for b in whole[first * 3 :]]


@pytest.mark.parametrize(
    ("order", "words"),
    [
        ((10, 16), ["got 10", "at least 16", "16 images a batch", "Lower batch_size."]),
        ((10, 8, 2), ["at least 16", "2 batches a step", "Lower batch_size or accumulate."]),
        ((1, 1, 1, 2), ["at least 2: 2 processes", "Lower the number of processes."]),
    ],
)
def test_fewer_images_than_a_step_takes_are_refused_with_what_to_lower(order, words):
    with pytest.raises(UsageError) as caught:
        Order(*order)
    assert all(word in str(caught.value) for word in words)


def test_draws_of_every_position_have_their_own_seed():
    positions = [(s, step, part, p) for s in (0, 1) for step in range(40) for part in (0, 1)
                 for p in (0, 1)]  # fmt: skip
    seeds = [draw_seed(*position) for position in positions]
    assert len(set(seeds)) == len(positions)
    assert all(0 <= seed < 2**63 for seed in seeds)
    torch.manual_seed(max(seeds))  # it takes no more than 64 bits, signed


def test_draws_of_neighbouring_steps_are_independent():
    """Bits of seeds next to each other agree as often as a coin's throws."""
    seeds = np.array([draw_seed(0, step, 0, 0) for step in range(500)], np.uint64)
    agreeing = 63 - np.bitwise_count(seeds[1:] ^ seeds[:-1])
    assert abs(agreeing.mean() - 31.5) < 4 * (63**0.5 / 2) / 499**0.5
