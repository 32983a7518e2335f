"""Hold back a part of a dataset, the same on every machine."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from coat_deploy.data.dataset import Dataset
from coat_deploy.data.options import TRAIN_SPLIT, VALIDATION_SPLITS
from coat_deploy.errors import UsageError, unknown_name

PARTS = (TRAIN_SPLIT, VALIDATION_SPLITS[0])
"""What the parts of `hold_back` are called."""

Indices = npt.NDArray[np.int64]


def stratified_split(labels: Indices, share: float, seed: int) -> tuple[Indices, Indices]:
    """Return the indices of the images kept and of those held back, both ascending.

    Each class of `labels` (N,) gives `round(share * n)` of its n images: at least 1 and at most
    all but 1 where it has 2, none where it has 1. Which, depends on the seed, the rank of the
    class and n alone: new images of one class leave the others' split as it was.
    """
    held = np.zeros(len(labels), dtype=bool)
    for rank, label in enumerate(np.unique(labels)):
        images = np.flatnonzero(labels == label)
        count = min(max(round(share * len(images)), 1), len(images) - 1)
        # NumPy has frozen the numbers of RandomState for good; those of its Generator may change.
        order = np.random.RandomState([seed, rank]).permutation(len(images))
        held[images[order[:count]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


@dataclass(frozen=True, eq=False)
class Subset:
    """Some images of a dataset, in the order of `indices`."""

    whole: Dataset
    indices: Indices

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class, those of the whole."""
        return self.whole.label_names

    @property
    def labels(self) -> npt.NDArray[np.int64]:
        """Class of each image, (N,)."""
        return self.whole.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int) -> str:
        """Return what stands for the image in messages, as in the whole."""
        return self.whole.name(int(self.indices[index]))

    def image(self, index: int) -> Image.Image:
        """Return the image as upright 8-bit RGB. Raises: ImageError."""
        return self.whole.image(int(self.indices[index]))


def hold_back(dataset: Dataset, share: float, seed: int, subject: str) -> tuple[Dataset, Dataset]:
    """Return a dataset in two, see `stratified_split`; `subject` names it in errors.

    Raises: UsageError for a class with a single image.
    """
    counts = np.bincount(dataset.labels, minlength=len(dataset.label_names))
    if (counts == 1).any():
        single = dataset.label_names[int(np.flatnonzero(counts == 1)[0])]
        raise UsageError(
            f"{subject}: class '{single}' has one image, which cannot be split (expected at least "
            "2 of each class). Add images, or a validation split."
        )
    kept, held = stratified_split(dataset.labels, share, seed)
    return Subset(dataset, kept), Subset(dataset, held)


def pick_part(parts: tuple[Dataset, Dataset], split: str | None, subject: str) -> Dataset:
    """Return the part of `hold_back` that is called `split`; None is what was held back.

    Raises: UsageError for another name than those of splits.
    """
    if split is not None and split not in PARTS:
        raise UsageError(f"{subject}: {unknown_name('split', split, PARTS)}")
    return parts[0] if split == PARTS[0] else parts[1]
