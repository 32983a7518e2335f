import contextlib
import multiprocessing
import os
import signal
import threading
import time

import numpy as np
import pytest
import torch
from torch.utils.data._utils.pin_memory import pin_memory  # what a loader calls

from coat_deploy.errors import ImageError, UsageError
from coat_deploy.train.supply import (
    Batch,
    DiskSupply,
    MemorySupply,
    Share,
    StreamSupply,
    open_supply,
    squash,
)
from coat_deploy.train.workers import in_workers, read_ahead

SIDE = 16
KINDS = ["memory", "disk", "disk, 2 workers", "stream"]


@pytest.fixture
def open_kind(toys):
    """Return a function that opens pictures as a kind of supply."""

    def opened(kind, pictures, share):
        if kind == "memory":
            return MemorySupply(pictures, SIDE, share)
        if kind == "stream":
            return StreamSupply(toys.Reel(pictures), SIDE, share)
        return DiskSupply(pictures, SIDE, share, 2 if "workers" in kind else 0)

    return opened


def batches(supply, epoch=0, first=0):
    return list(supply.batches(epoch, first))


def names(found):
    return [batch.names for batch in found]


def same(found, expected):
    assert names(found) == names(expected)
    for one, other in zip(found, expected, strict=True):
        for tensor in ("images", "aspects", "labels"):
            assert torch.equal(getattr(one, tensor), getattr(other, tensor))
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_holds_images_aspects_labels_and_names_of_the_same_pictures(toys, open_kind, kind):
    pictures = toys.Pictures(12, size=[(20, 26), (31, 17), (9, 9)])
    found = batches(open_kind(kind, pictures, Share(4)))
    assert len(found) == 3
    for batch in found:
        assert batch.images.shape == (4, 3, SIDE, SIDE) and batch.images.dtype == torch.uint8
        assert batch.images.is_contiguous()
        for i, name in enumerate(batch.names):
            index = int(name.split()[1])
            image = pictures.image(index)
            assert np.array_equal(batch.images[i].numpy(), squash(image, SIDE))
            assert batch.aspects[i].item() == pytest.approx(image.width / image.height)
            assert batch.labels[i].item() == pictures.labels[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_disk_gives_the_batches_of_memory_to_the_bit(toys, workers):
    """So that a training may be resumed with another amount of memory."""
    share = Share(4, accumulate=2, process=1, processes=2, repeats=2, seed=3)
    pictures = toys.Pictures(37, size=[(20, 26), (31, 17)])
    memory, disk = MemorySupply(pictures, SIDE, share), DiskSupply(pictures, SIDE, share, workers)
    for epoch in (0, 1):
        assert same(batches(disk, epoch), batches(memory, epoch))


@pytest.mark.parametrize("kind", KINDS)
def test_every_image_is_seen_once_an_epoch(toys, open_kind, kind):
    found = batches(open_kind(kind, toys.Pictures(12), Share(4)), epoch=1)
    assert sorted(sum(names(found), ())) == sorted(f"picture {i}" for i in range(12))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("repeats", [1, 3])
def test_the_rest_of_an_epoch_is_that_of_one_not_interrupted(toys, open_kind, kind, repeats):
    share = Share(2, accumulate=2, repeats=repeats)
    whole = batches(open_kind(kind, toys.Pictures(17), share), epoch=1)
    assert len(whole) == 8
    for first in (1, 3):
        rest = batches(open_kind(kind, toys.Pictures(17), share), 1, first)
        assert same(rest, whole[2 * first :])


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_is_drawn_from_the_generator_of_the_training(toys, open_kind, kind):
    """Or a step would draw others where the training is resumed at it."""
    supply = open_kind(kind, toys.Pictures(8), Share(4))
    torch.manual_seed(0)
    state = torch.random.get_rng_state()
    assert len(batches(supply)) == 2
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_see_the_images_of_one_with_twice_the_batch(
    toys, open_kind, kind, accumulate
):
    pictures = toys.Pictures(24)
    one = batches(open_kind(kind, pictures, Share(4, accumulate)))
    two = [
        batches(open_kind(kind, pictures, Share(2, accumulate, process, 2))) for process in (0, 1)
    ]
    assert len(one) == len(two[0]) == len(two[1]) == 6
    for whole, *parts in zip(names(one), *map(names, two), strict=True):
        assert sorted(whole) == sorted(sum(parts, ()))


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_that_is_left_early_leaves_no_thread_and_no_process(toys, open_kind, kind):
    threads = threading.active_count()
    running = open_kind(kind, toys.Pictures(40), Share(2)).batches(0)
    next(running)
    running.close()
    assert multiprocessing.active_children() == []
    deadline = time.monotonic() + 5  # a queue's own thread ends a moment after it is closed
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.001)
    assert threading.active_count() == threads


def reports(caplog):
    return [record.getMessage() for record in caplog.records]


def test_in_memory_corrupt_images_are_told_once_and_left_out(toys, caplog):
    supply = MemorySupply(toys.Pictures(14, broken=(3, 7)), SIDE, Share(4))
    assert supply.order.images == 12
    seen = sum(names(batches(supply, 0) + batches(supply, 1)), ())
    assert sorted(seen) == sorted(2 * [f"picture {i}" for i in range(14) if i not in (3, 7)])
    assert reports(caplog) == [
        "skipped: picture 3: is broken.", "skipped: picture 7: is broken."
    ]  # fmt: skip


def test_of_several_processes_that_read_all_only_the_first_tells(toys, caplog):
    MemorySupply(toys.Pictures(14, broken=(3,)), SIDE, Share(4, process=1, processes=2))
    assert reports(caplog) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_from_disk_corrupt_images_are_told_once_and_the_next_one_stands_in(toys, caplog, workers):
    whole = batches(DiskSupply(toys.Pictures(12), SIDE, Share(4), workers))
    supply = DiskSupply(toys.Pictures(12, broken=(3, 4, 11)), SIDE, Share(4), workers)
    instead = {"picture 3": "picture 5", "picture 4": "picture 5", "picture 11": "picture 0"}
    found = batches(supply)
    assert names(found) == [tuple(instead.get(n, n) for n in names) for names in names(whole)]
    for batch in found:
        assert [int(n.split()[1]) % 3 for n in batch.names] == batch.labels.tolist()
    batches(supply, 1)
    assert sorted(reports(caplog)) == [
        f"skipped: picture {i}: is broken." for i in (11, 3, 4)
    ]  # fmt: skip


def test_where_no_image_can_be_read_memory_is_not_opened(toys):
    with pytest.raises(ImageError, match="none of the 5 training images can be read"):
        MemorySupply(toys.Pictures(5, broken=range(5)), SIDE, Share(2))


@pytest.mark.parametrize("workers", [0, 2])
def test_where_no_image_can_be_read_disk_says_so_in_one_line(toys, workers):
    supply = DiskSupply(toys.Pictures(5, broken=range(5)), SIDE, Share(2), workers)
    with pytest.raises(ImageError, match="5 in a row from picture .* cannot be read") as caught:
        batches(supply)
    assert "\n" not in str(caught.value)


def test_fewer_readable_images_than_a_step_takes_are_refused(toys):
    with pytest.raises(UsageError, match="got 3, expected at least 4"):
        MemorySupply(toys.Pictures(5, broken=(0, 1)), SIDE, Share(4))


def test_labels_that_may_not_be_written_are_read(toys):
    pictures = toys.Pictures(4)
    pictures.labels.flags.writeable = False
    assert len(batches(MemorySupply(pictures, SIDE, Share(4)))) == 1


def test_memory_is_chosen_where_the_images_fit(toys):
    need = 12 * 3 * SIDE * SIDE
    assert isinstance(open_supply(toys.Pictures(12), SIDE, Share(4), need, 0), MemorySupply)
    assert isinstance(open_supply(toys.Pictures(12), SIDE, Share(4), need - 1, 0), DiskSupply)
    reel = toys.Reel(toys.Pictures(12))
    assert isinstance(open_supply(reel, SIDE, Share(4), need, 0), StreamSupply)


def test_a_stream_that_ends_early_begins_again(toys):
    supply = StreamSupply(toys.Reel(toys.Pictures(5), length=12), SIDE, Share(4))
    order = [*range(5), *range(5), 0, 1]
    assert sum(names(batches(supply)), ()) == tuple(f"picture {i}" for i in order)


@pytest.mark.parametrize("first", [1, 2, 3])
def test_the_rest_of_an_epoch_of_a_stream_that_ends_early_is_the_same(toys, first):
    """Also where all the stream holds has been skipped."""
    reel = toys.Reel(toys.Pictures(5), length=17)
    whole = batches(StreamSupply(reel, SIDE, Share(4)))
    assert same(batches(StreamSupply(reel, SIDE, Share(4)), 0, first), whole[first:])


def test_a_stream_repeats_its_images_as_an_order_does(toys):
    supply = StreamSupply(toys.Reel(toys.Pictures(9)), SIDE, Share(3, repeats=3))
    assert names(batches(supply)) == [(f"picture {i}",) * 3 for i in range(3)]


def test_an_empty_stream_is_one_clear_line(toys):
    reel = toys.Reel(toys.Pictures(4, broken=range(4)))
    with pytest.raises(ImageError, match="the stream holds none that can be read"):
        batches(StreamSupply(reel, SIDE, Share(2)))


def test_a_stream_of_unknown_length_is_refused_with_the_way_out(toys):
    reel = toys.Reel(toys.Pictures(4))
    reel.length = None
    with pytest.raises(UsageError, match="does not tell how many.*leave out --streaming"):
        StreamSupply(reel, SIDE, Share(2))


def test_what_a_stream_raises_is_raised_where_its_batches_are_read(toys):
    class Torn(toys.Reel):
        def samples(self, *place):
            yield from list(super().samples(*place))[:3]
            raise ConnectionError("the line is down")

    running = StreamSupply(Torn(toys.Pictures(8)), SIDE, Share(2)).batches(0)
    assert next(running).names == ("picture 0", "picture 1")
    with pytest.raises(ConnectionError, match="the line is down"):
        next(running)
    assert "read ahead" not in [thread.name for thread in threading.enumerate()]


def test_a_thread_reads_ahead_no_further_than_asked():
    begun = []

    def items():
        for i in range(100):
            begun.append(i)
            yield i

    running = read_ahead(items(), 3)
    assert next(running) == 0
    deadline = time.monotonic() + 10
    while len(begun) < 5 and time.monotonic() < deadline:
        time.sleep(0.001)
    time.sleep(0.05)
    assert begun == [0, 1, 2, 3, 4]  # one was taken, three wait, one wants to
    assert list(running) == list(range(1, 100))


def test_workers_live_on_when_the_whole_group_is_asked_to_end():
    """Ctrl-C reaches every process: the training saves first, which needs its next batch."""
    results = in_workers(lambda indices: (os.getpid(), int(indices)), range(40), 2)
    workers = {next(results)[0], next(results)[0]}
    assert os.getpid() not in workers
    for pid in workers:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
    assert [index for _, index in results] == list(range(2, 40))


def test_a_worker_ends_at_the_second_request():
    results = in_workers(lambda indices: time.sleep(0.01), range(40), 1)
    next(results)
    (worker,) = multiprocessing.active_children()
    worker.terminate()
    worker.join(0.2)
    assert worker.is_alive()
    with contextlib.suppress(RuntimeError):  # PyTorch may come to know first
        worker.terminate()
        worker.join(5)
    assert not worker.is_alive()


def test_more_workers_than_cores_are_nobodys_business():
    """They may wait for a disk together; PyTorch would warn at every epoch."""
    assert list(in_workers(int, range(3), len(os.sched_getaffinity(0)) + 1)) == [0, 1, 2]


def test_a_loader_for_a_gpu_pins_the_tensors_of_a_batch(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)
    batch = Batch(torch.zeros(2), torch.ones(2), torch.tensor([2, 2]), ("a", "b"))
    pinned, faults = pin_memory((batch, {}))
    assert [t.tolist() for t in (pinned.images, pinned.aspects, pinned.labels)] == [
        [1, 1], [2, 2], [3, 3]
    ]  # fmt: skip
    assert (pinned.names, faults) == (("a", "b"), {})
