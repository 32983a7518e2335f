"""Training images as batches: out of memory, decoded on the way, or from a stream.

Every image is squashed to a square of one side, and its aspect ratio is kept beside it, so that a
batch is one tensor whatever the shapes of the photographs; crops are made of it on the device, in
the geometry of the original (see `crop.py`).
"""

import logging
import os
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from coat_deploy.data.dataset import Dataset, Sample, Stream
from coat_deploy.errors import ImageError, UsageError
from coat_deploy.train.order import Indices, Order
from coat_deploy.train.workers import in_workers, read_ahead

_log = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

STORED_SIDE = 1.5
"""Side of a stored image by that of the crops made of it: a crop of 44% of the area, less than
the mean of those drawn from 8% to 100%, then still has a pixel for each of its own."""
PREFETCHED = 4
"""Batches of a stream that are read ahead."""
MAX_UNREADABLE_IN_A_ROW = 100


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, S, S) uint8, aspects (B,) width by height, labels (B,), and their names."""

    images: Tensor
    aspects: Tensor
    labels: Tensor
    names: tuple[str, ...]

    def pin_memory(self) -> "Batch":
        """Return the batch where a GPU can copy it from by itself; a loader asks for it."""
        places = [tensor.pin_memory() for tensor in (self.images, self.aspects, self.labels)]
        return Batch(places[0], places[1], places[2], self.names)


class Supply(Protocol):
    """Batches of one process; `order` says how many there are."""

    order: Order

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from a step on, `order.accumulate` a step."""
        ...


@dataclass(frozen=True)
class Share:
    """Which part of every step is this process's, and how it is made up: see `Order`."""

    batch_size: int
    accumulate: int = 1
    process: int = 0
    processes: int = 1
    repeats: int = 1
    seed: int = 0

    def order(self, images: int) -> Order:
        """Return the order of so many images."""
        return Order(
            images, self.batch_size, self.accumulate, self.processes, self.repeats, self.seed
        )


def open_supply(
    data: Dataset | Stream, side: int, share: Share, memory_bytes: int, workers: int
) -> Supply:
    """Return the batches of a dataset: out of memory where it fits into `memory_bytes`.

    side: S, of the stored images in pixels.
    Raises: UsageError for fewer images than a step takes; ImageError when none can be read.
    """
    if isinstance(data, Stream):
        return StreamSupply(data, side, share)
    if len(data) * 3 * side * side <= memory_bytes:
        return MemorySupply(data, side, share)
    return DiskSupply(data, side, share, workers)


def squash(image: Image.Image, side: int) -> Pixels:
    """Return an RGB image as (3, side, side), whatever its aspect ratio."""
    squashed = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.array(np.asarray(squashed).transpose(2, 0, 1), order="C")


@dataclass(frozen=True)
class _Row:
    """An image of a batch: its pixels (3, S, S) and what goes with them."""

    pixels: Pixels
    aspect: float
    label: int
    name: str


def _row(image: Image.Image, side: int, label: int, name: str) -> _Row:
    return _Row(squash(image, side), image.width / image.height, label, name)


def _batch(rows: Sequence[_Row]) -> Batch:
    return Batch(
        torch.from_numpy(np.stack([row.pixels for row in rows])),
        torch.tensor([row.aspect for row in rows]),
        torch.tensor([row.label for row in rows]),
        tuple(row.name for row in rows),
    )


class MemorySupply:
    """Every image decoded once, by threads, and kept; those that cannot be read are left out."""

    def __init__(self, data: Dataset, side: int, share: Share) -> None:
        self._share = share
        images = torch.empty((len(data), 3, side, side), dtype=torch.uint8)
        aspects = torch.zeros(len(data))

        def read(index: int) -> str | None:
            try:
                image = data.image(index)
            except ImageError as error:
                return str(error)
            images[index] = torch.from_numpy(squash(image, side))
            aspects[index] = image.width / image.height
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = list(pool.map(read, range(len(data))))
        # Every process reads all; the first one tells.
        _report([fault for fault in faults if fault], len(data), tell=share.process == 0)
        self._kept = np.flatnonzero([fault is None for fault in faults])
        self._images, self._aspects = images, aspects
        self._labels = torch.tensor(data.labels)
        self._data = data
        self.order = share.order(len(self._kept))

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from a step on."""
        for chosen in self.order.batches(epoch, self._share.process, first_step):
            indices = self._kept[chosen]
            rows = torch.from_numpy(indices)
            names = tuple(self._data.name(int(i)) for i in indices)
            yield Batch(self._images[rows], self._aspects[rows], self._labels[rows], names)


class DiskSupply:
    """Images decoded by worker processes while the network is at work.

    In the place of an image that cannot be read stands the next that can.
    """

    def __init__(self, data: Dataset, side: int, share: Share, workers: int) -> None:
        self._share = share
        self._reader = _Reader(data, side)
        self._workers = workers
        self._told: set[str] = set()
        self.order = share.order(len(data))

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from a step on."""
        chosen = self.order.batches(epoch, self._share.process, first_step)
        for batch, faults in in_workers(self._reader.read, chosen, self._workers):
            for name, fault in faults.items():
                if name not in self._told:
                    self._told.add(name)
                    _log.warning("skipped: %s", fault)
            if isinstance(batch, ImageError):
                raise batch
            yield batch


_Read = tuple[Batch | ImageError, Mapping[str, str]]
"""A batch, or why there is none; and the reasons by name of the images that cannot be read."""


@dataclass(frozen=True)
class _Reader:
    """Reads batches of a dataset in worker processes, of which none knows what others told."""

    data: Dataset
    side: int

    def read(self, indices: Indices) -> _Read:
        """Return the batch of these images."""
        faults: dict[str, str] = {}
        try:
            return _batch([self._row(int(index), faults) for index in indices]), faults
        except ImageError as error:
            return error, faults

    def _row(self, index: int, faults: dict[str, str]) -> _Row:
        """Return the image, or the next that can be read; note in `faults` which cannot."""
        for offset in range(min(len(self.data), MAX_UNREADABLE_IN_A_ROW)):
            i = (index + offset) % len(self.data)
            name, label = self.data.name(i), int(self.data.labels[i])
            try:
                return _row(self.data.image(i), self.side, label, name)
            except ImageError as error:
                faults[name] = str(error)
        raise ImageError(
            f"training images: {offset + 1} in a row from {self.data.name(index)} on cannot be "
            "read. Check the disk, or give other images."
        )


class StreamSupply:
    """Images in the order of a stream, read ahead by a thread."""

    def __init__(self, data: Stream, side: int, share: Share) -> None:
        if data.length is None:
            raise UsageError(
                "training images: the stream does not tell how many an epoch has. "
                "Give it with --stream-length, or leave out --streaming."
            )
        self._data, self._side, self._share = data, side, share
        self.order = share.order(data.length)

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from a step on."""
        yield from read_ahead(self._read(epoch, first_step), PREFETCHED)

    def _read(self, epoch: int, first_step: int) -> Iterator[Batch]:
        size, accumulate = self._share.batch_size, self._share.accumulate
        samples = self._samples(epoch, first_step * accumulate * size)
        for _ in range((self.order.steps - first_step) * accumulate):
            yield _batch([self._row(next(samples)) for _ in range(size)])

    def _samples(self, epoch: int, skipped: int) -> Iterator[Sample]:
        """Yield samples without end, each `repeats` times, after `skipped` of them.

        A stream may hold fewer images than it says: then it begins again.
        """
        repeats = self._share.repeats
        skipped, part = divmod(skipped, repeats)
        while True:
            sample = None
            for sample in self._shard(epoch, skipped):
                for _ in range(part, repeats):
                    yield sample
                part = 0
            if sample is None:
                # Nothing is left after those skipped, in the first round: go round as it would.
                held = sum(1 for _ in self._shard(epoch, 0))
                if not held:
                    raise ImageError(
                        "training images: the stream holds none that can be read. Check it."
                    )
                skipped %= held
            else:
                skipped = 0

    def _shard(self, epoch: int, skipped: int) -> Iterator[Sample]:
        return self._data.samples(epoch, self._share.process, self._share.processes, skipped)

    def _row(self, sample: Sample) -> _Row:
        return _row(sample.image, self._side, sample.label, sample.name)


def _report(faults: Sequence[str], total: int, tell: bool) -> None:
    """Tell each image that is left out, once. Raises ImageError when that is every one."""
    if len(faults) == total:
        raise ImageError(f"none of the {total} training images can be read. The first: {faults[0]}")
    for fault in faults if tell else ():
        _log.warning("skipped: %s", fault)
