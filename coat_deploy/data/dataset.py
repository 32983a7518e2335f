"""What a source of labelled images gives: datasets with random access, and streams."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from PIL import Image


@runtime_checkable
class Dataset(Protocol):
    """Labelled images with random access, from several threads at once too."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""
        ...

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image, (N,)."""
        ...

    def __len__(self) -> int:
        """Return N, the number of images."""
        ...

    def name(self, index: int) -> str:
        """Return what stands for the image in messages: its path. Every image has its own."""
        ...

    def image(self, index: int) -> Image.Image:
        """Return the image as upright 8-bit RGB. Raises: ImageError for one that is corrupt."""
        ...


@dataclass(frozen=True)
class Sample:
    """An upright 8-bit RGB image, its class and what stands for it in messages."""

    image: Image.Image
    label: int
    name: str


@runtime_checkable
class Stream(Protocol):
    """Labelled images in sequence, of a source too large to hold or to index."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""
        ...

    @property
    def length(self) -> int | None:
        """Images in an epoch, where the source tells."""
        ...

    def samples(
        self, epoch: int, shard: int = 0, shards: int = 1, skip: int = 0
    ) -> Iterator[Sample]:
        """Yield every `shards`-th sample from `shard` on, after `skip` of them.

        The order is the epoch's own and always the same, so that `skip` takes up an epoch where
        it was left. A corrupt image is logged once and the next readable one stands in its
        place, so that the positions of the others do not depend on it.
        """
        ...


@dataclass(frozen=True)
class Splits:
    """What is trained on, and what is held back to measure with."""

    train: Dataset | Stream
    validation: Dataset | None
