"""Training images as batches: out of memory, decoded on the way, or from a stream.

Every image is squashed to a square of one side, and its aspect ratio is kept beside it, so that a
batch is one tensor whatever the shapes of the photographs; crops are made of it on the device, in
the geometry of the original (see `crop.py`).
"""

import logging
import os
import queue
import threading
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader

from coat_deploy.data.dataset import Dataset, Sample, Stream
from coat_deploy.errors import ImageError, UsageError
from coat_deploy.train.order import Order

_log = logging.getLogger(__name__)

STORED_SIDE = 1.5
"""Side of a stored image by that of the crops made of it: a crop of 44% of the area, less than
the mean of those drawn from 8% to 100%, then still has a pixel for each of its own."""
PREFETCHED = 4
MAX_UNREADABLE_IN_A_ROW = 100


@dataclass(frozen=True)
class Batch:
    """Images (B, 3, S, S) uint8, aspects (B,) width by height, labels (B,), and their names."""

    images: Tensor
    aspects: Tensor
    labels: Tensor
    names: tuple[str, ...]


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


def squash(image: Image.Image, side: int) -> npt.NDArray[np.uint8]:
    """Return an RGB image as (3, side, side), whatever its aspect ratio."""
    squashed = image.resize((side, side), Image.Resampling.BICUBIC)
    return np.asarray(squashed).transpose(2, 0, 1)


def _aspect(image: Image.Image) -> float:
    return image.width / image.height


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
            images[index] = torch.from_numpy(squash(image, side).copy())
            aspects[index] = _aspect(image)
            return None

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            faults = list(pool.map(read, range(len(data))))
        _report([fault for fault in faults if fault], len(data))
        kept = np.flatnonzero([fault is None for fault in faults])
        self._images, self._aspects = images, aspects
        self._labels = torch.from_numpy(np.ascontiguousarray(data.labels))
        self._kept = kept
        self._data = data
        self.order = share.order(len(kept))

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from a step on."""
        for chosen in self.order.batches(epoch, self._share.process, first_step):
            indices = self._kept[chosen]
            rows = torch.from_numpy(indices)
            names = tuple(self._data.name(int(i)) for i in indices)
            yield Batch(self._images[rows], self._aspects[rows], self._labels[rows], names)


class DiskSupply:
    """Images decoded by worker processes while the network is at work."""

    def __init__(self, data: Dataset, side: int, share: Share, workers: int) -> None:
        self._share = share
        self._squashed = _Squashed(data, side)
        self._workers = workers
        self.order = share.order(len(data))

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from a step on."""
        loader: DataLoader[Batch] = DataLoader(
            self._squashed,  # type: ignore[arg-type]  # a sequence is enough
            batch_sampler=[
                chosen.tolist()
                for chosen in self.order.batches(epoch, self._share.process, first_step)
            ],
            num_workers=self._workers,
            collate_fn=_collate,
            prefetch_factor=PREFETCHED if self._workers else None,
            pin_memory=torch.cuda.is_available(),
        )
        yield from loader


@dataclass
class _Squashed:
    """A dataset as the loader's workers read it."""

    data: Dataset
    side: int
    told: set[str] = field(default_factory=set)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Sample, float]:
        """Return an image; in the place of one that cannot be read, the next that can."""
        for offset in range(min(len(self.data), MAX_UNREADABLE_IN_A_ROW)):
            i = (int(index) + offset) % len(self.data)
            try:
                image = self.data.image(i)
            except ImageError as error:
                if self.data.name(i) not in self.told:
                    self.told.add(self.data.name(i))
                    _log.warning("skipped: %s", error)
                continue
            small = Image.fromarray(squash(image, self.side).transpose(1, 2, 0))
            return Sample(small, int(self.data.labels[i]), self.data.name(i)), _aspect(image)
        raise ImageError(
            f"training images: {MAX_UNREADABLE_IN_A_ROW} in a row from {self.data.name(index)} on "
            "cannot be read. Check the disk, or give other images."
        )


class StreamSupply:
    """Images in the order of a stream, read ahead by a thread."""

    def __init__(self, data: Stream, side: int, share: Share) -> None:
        if data.length is None:
            raise UsageError(
                "training images: the stream does not tell how many an epoch has. "
                "Leave out --streaming, or choose a source that tells."
            )
        self._data, self._side, self._share = data, side, share
        self.order = share.order(data.length)

    def batches(self, epoch: int, first_step: int = 0) -> Generator[Batch]:
        """Yield the batches of an epoch from a step on."""
        size = self._share.batch_size
        wanted = (self.order.steps - first_step) * self._share.accumulate
        skipped = first_step * self._share.accumulate * size
        ready: queue.Queue[Batch | BaseException] = queue.Queue(PREFETCHED)
        stopped = threading.Event()

        def put(item: Batch | BaseException) -> None:
            while not stopped.is_set():
                try:
                    return ready.put(item, timeout=0.1)
                except queue.Full:
                    continue

        def read() -> None:
            try:
                samples = self._samples(epoch, skipped)
                for _ in range(wanted):
                    put(_collate([self._squashed(next(samples)) for _ in range(size)]))
                    if stopped.is_set():
                        return
            except BaseException as error:
                put(error)

        reader = threading.Thread(target=read, daemon=True, name="stream")
        reader.start()
        try:
            for _ in range(wanted):
                item = ready.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
        finally:
            stopped.set()
            reader.join()

    def _samples(self, epoch: int, skipped: int) -> Iterator[Sample]:
        """Yield samples without end: a stream may hold fewer readable images than it says."""
        process, processes = self._share.process, self._share.processes
        some = True
        while some:
            some = False
            for sample in self._data.samples(epoch, process, processes, skipped):
                some = True
                yield sample
            some = some or skipped > 0
            skipped = 0
        raise ImageError("training images: the stream holds none that can be read. Check it.")

    def _squashed(self, sample: Sample) -> tuple[Sample, float]:
        small = Image.fromarray(squash(sample.image, self._side).transpose(1, 2, 0))
        return Sample(small, sample.label, sample.name), _aspect(sample.image)


def _collate(items: Sequence[tuple[Sample, float]]) -> Batch:
    pixels = np.stack([np.asarray(sample.image) for sample, _ in items]).transpose(0, 3, 1, 2)
    return Batch(
        torch.from_numpy(np.ascontiguousarray(pixels)),
        torch.tensor([aspect for _, aspect in items]),
        torch.tensor([sample.label for sample, _ in items]),
        tuple(sample.name for sample, _ in items),
    )


def _report(faults: Sequence[str], total: int) -> None:
    """Tell each image that is left out, once. Raises ImageError when that is every one."""
    for fault in faults:
        _log.warning("skipped: %s", fault)
    if len(faults) == total:
        raise ImageError(
            f"none of the {total} training images can be read. Give others, or mend them."
        )
