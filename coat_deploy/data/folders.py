"""Folders of images: `FOLDER/cat/1.jpg`, or `FOLDER/train/cat/1.jpg` and `FOLDER/validation/...`.

The first folder below FOLDER, or below the split, is the class, whatever lies between it and the
image (`FOLDER/cat/old/1.jpg`: cat).

A folder has splits where one of its folders is called as they are (`train`; `validation`, `val`,
`valid`, `test`) and holds folders itself, or where all are called so: a class may be called
`train`. What is measured with is the first of `validation`, `val`, `valid` and `test` that is
there: a `test` beside a `validation` is left alone, and so are other folders beside the splits.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from coat_deploy.data.classes import check_same_names, some
from coat_deploy.data.dataset import Dataset, Splits
from coat_deploy.data.options import TRAIN_SPLIT, VALIDATION_SPLITS, DataOptions
from coat_deploy.data.split import PARTS, hold_back, pick_part
from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.image_files import SUFFIXES, find_labelled_images
from coat_deploy.images import decode


@dataclass(frozen=True, eq=False)
class ImageFiles:
    """Image files, decoded when they are asked for."""

    paths: tuple[Path, ...]
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int) -> str:
        """Return the path of an image."""
        return str(self.paths[index])

    def image(self, index: int) -> Image.Image:
        """Decode an image: upright 8-bit RGB. Raises: ImageError naming its path."""
        return decode(self.paths[index])


def open_folder(folder: Path, options: DataOptions) -> Splits:
    """Return what to train on and what to measure with.

    Where there is no split to measure with, a share of each class is held back.
    Raises: UsageError for a split that is not there, for what `read_class_folders` refuses, for
        splits whose class folders differ, and for a class with too few images to be split.
    """
    splits = _splits(folder, options)
    measured = options.measured(splits)
    if measured is None:
        return Splits(*_in_two(folder, splits, options))
    train = read_class_folders(_find(folder, options.train_split or TRAIN_SPLIT))
    validation = read_class_folders(_find(folder, measured))
    check_same_names(train.label_names, validation.label_names, str(folder))
    return Splits(train, validation)


def open_folder_split(folder: Path, split: str | None, options: DataOptions) -> Dataset:
    """Return one split by name; None is what to measure with, or every image where that is none.

    Without a split to measure with, `train` and `validation` are the parts of `open_folder`.
    Raises: UsageError as `open_folder`.
    """
    splits = _splits(folder, options)
    measured = options.measured(splits)
    if split is None:
        everything = _all(folder, splits, options)
        return read_class_folders(_find(folder, measured) if measured else everything)
    if splits and (measured or split not in PARTS):
        return read_class_folders(_find(folder, split))
    return pick_part(_in_two(folder, splits, options), split, str(folder))


def read_class_folders(folder: Path) -> ImageFiles:
    """Return the images below class folders, the classes in the order of their names.

    Nothing is decoded yet.
    Raises: UsageError for a folder without images, for an empty class folder, and for images that
        lie in none.
    """
    found = find_labelled_images([folder])
    if outside := [image.path for image in found if image.label is None]:
        raise UsageError(
            f"{outside[0]}: lies in no class folder of {folder} (so do {len(outside)} of "
            f"{len(found)} images). Move each image into a folder named after its class."
        )
    names = tuple(_folders(folder))
    with_images = {image.label for image in found}
    if empty := [name for name in names if name not in with_images]:
        raise UsageError(
            f"{folder / empty[0]}: no image in this class folder (empty: {some(empty)}). "
            f"Add images that end in {', '.join(SUFFIXES)}, or remove the folder."
        )
    classes = {name: i for i, name in enumerate(names)}
    labels = np.array([classes[str(image.label)] for image in found], dtype=np.int64)
    return ImageFiles(tuple(image.path for image in found), labels, names)


def _splits(folder: Path, options: DataOptions) -> list[str]:
    """Return the folders that are splits, and those beside them; nothing where classes lie."""
    folders = _folders(folder)
    if options.train_split or options.validation_split:
        return folders
    usual = [name for name in folders if name in (TRAIN_SPLIT, *VALIDATION_SPLITS)]
    deep = any(_folders(folder / name) for name in usual)
    return folders if deep or len(usual) == len(folders) else []


def _all(folder: Path, splits: Sequence[str], options: DataOptions) -> Path:
    """Return the folder of all that is trained on."""
    return _find(folder, options.train_split or TRAIN_SPLIT) if splits else folder


def _in_two(folder: Path, splits: Sequence[str], options: DataOptions) -> tuple[Dataset, Dataset]:
    """Return all that is trained on in two parts, the second held back to measure with."""
    images = read_class_folders(_all(folder, splits, options))
    return hold_back(images, options.validation_share, options.seed, str(folder))


def _find(folder: Path, split: str) -> Path:
    if split not in (known := _folders(folder)):
        raise UsageError(f"{folder}: {unknown_name('split', split, known)}")
    return folder / split


def _folders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted; hidden ones do not count."""
    try:
        with os.scandir(folder) as listing:
            return sorted(e.name for e in listing if e.is_dir() and not e.name.startswith("."))
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be listed ({error.strerror}). Check its permissions."
        ) from error
