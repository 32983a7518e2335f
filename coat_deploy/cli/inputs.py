"""Images for the commands that take them: found, decoded batch by batch, broken ones told."""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from coat_deploy.cli import console
from coat_deploy.data.dataset import Dataset
from coat_deploy.errors import ImageError
from coat_deploy.image_files import find_labelled_images
from coat_deploy.images import load, preprocess
from coat_deploy.measure.validate import Batch, batch_sizes_in_turn
from coat_deploy.runner import Array, Pixels
from coat_deploy.spec import Preprocess


@dataclass(frozen=True)
class Input:
    """An image to come: what it is called, its label if it has one, and how to make it pixels.

    `load` raises ImageError.
    """

    name: str
    label: str | None
    load: Callable[[Preprocess], Array]


@dataclass
class Images:
    """Images to run through a network, and those that turned out broken on the way.

    `classes` maps a label to its class; an image whose label is not in it has none.
    """

    found: Sequence[Input]
    batch_sizes: Sequence[int]
    classes: dict[str, int] = field(default_factory=dict)
    broken: dict[str, str] = field(default_factory=dict)

    def batches(self, how: Preprocess) -> Iterator[Batch]:
        """Yield every image that can be read, once, in batches of the given sizes in turn.

        Raises: ImageError when none can be read.
        """
        readable = self._readable(how)
        for part in batch_sizes_in_turn(len(self.found), self.batch_sizes):
            taken = list(itertools.islice(readable, len(part)))
            if taken:
                yield self._batch(taken)
        self._check()

    def _readable(self, how: Preprocess) -> Iterator[tuple[Input, Array]]:
        for image in self.found:
            if image.name in self.broken:
                continue
            try:
                yield image, image.load(how)
            except ImageError as error:
                self.broken[image.name] = str(error)
                console.note(f"skipped: {error}")

    def _batch(self, taken: Sequence[tuple[Input, Array]]) -> Batch:
        labels = [self.classes.get(image.label or "", -1) for image, _ in taken]
        return Batch(
            np.stack([pixels for _, pixels in taken]),
            tuple(image.name for image, _ in taken),
            None if not self.classes or min(labels) < 0 else tuple(labels),
        )

    def _check(self) -> None:
        if len(self.broken) == len(self.found):
            raise ImageError(
                f"none of the {len(self.found)} images can be read. Give others, or mend them."
            )

    def first(self, how: Preprocess, count: int = 2) -> Pixels:
        """Return the first few images that can be read, (B, 3, H, W). Raises ImageError."""
        some = [pixels for _, pixels in itertools.islice(self._readable(how), count)]
        self._check()
        return np.stack(some)

    def skipped(self) -> dict[str, str]:
        """Return the images that could not be read, and why."""
        return dict(self.broken)

    def finish(self, strict: bool) -> None:
        """Tell how many were broken. Raises ImageError with `strict`."""
        if not self.broken:
            return
        message = f"{len(self.broken)} of {len(self.found)} images could not be read"
        if strict:
            raise ImageError(f"{message}, and --strict is set. Remove or mend them.")
        console.note(f"{message} and were skipped.")


def find(paths: Sequence[Path], batch_sizes: Sequence[int], limit: int | None = None) -> Images:
    """Return the images of files and folders, with `limit` so many of them spread evenly."""
    found = [
        Input(str(image.path), image.label, functools.partial(load, image.path))
        for image in find_labelled_images(paths)
    ]
    return Images(_spread(found, limit), batch_sizes)


def of_dataset(dataset: Dataset, batch_sizes: Sequence[int], limit: int | None = None) -> Images:
    """Return the images of a dataset, with `limit` so many of them spread evenly."""
    classes = dataset.labels.tolist()
    found = [
        Input(dataset.name(i), dataset.label_names[label], functools.partial(_load, dataset, i))
        for i, label in enumerate(classes)
    ]
    return Images(_spread(found, limit), batch_sizes)


def _load(dataset: Dataset, index: int, how: Preprocess) -> Array:
    return preprocess(dataset.image(index), how, dataset.name(index))


def _spread(found: Sequence[Input], limit: int | None) -> Sequence[Input]:
    if limit is None or limit >= len(found):
        return found
    step = len(found) / limit
    return [found[int(i * step)] for i in range(limit)]


def match_labels(images: Images, labels: Sequence[str]) -> str | None:
    """Take the folders' names for classes where all are labels of the model.

    Return None if so, else why not; the empty string where the images are in no folders.
    """
    classes = {label: i for i, label in enumerate(labels)}
    unlabelled = [image for image in images.found if image.label is None]
    named = dict.fromkeys(image.label for image in images.found if image.label is not None)
    unknown = [name for name in named if name not in classes]
    if not named:
        return ""
    if unknown:
        return f"folder '{unknown[0]}' is not among the model's {len(labels)} labels"
    if unlabelled:
        return f"{unlabelled[0].name} lies in no class folder"
    images.classes = classes
    return None


def load_batches(paths: Sequence[Path]) -> Callable[[Preprocess], Iterator[Batch]]:
    """Return what makes batches of the images at `paths` for a preprocessing."""
    images = find(paths, (1, 2, 8))

    def batches(how: Preprocess) -> Iterator[Batch]:
        yield from images.batches(how)
        images.finish(strict=False)

    return batches
