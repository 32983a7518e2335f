"""Find the images of files and folders, and the labels that class folders give them."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from coat_deploy.errors import UsageError

SUFFIXES = (".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")
"""What is taken for an image in a folder; upper case too. A file named outright may have any."""


@dataclass(frozen=True)
class LabelledImage:
    """An image file and its class as the folders tell it, if they do."""

    path: Path
    label: str | None = None


def find_images(paths: Sequence[Path], recursive: bool = True) -> list[Path]:
    """Return the images of files and folders; see `find_labelled_images`."""
    return [image.path for image in find_labelled_images(paths, recursive)]


def find_labelled_images(paths: Sequence[Path], recursive: bool = True) -> list[LabelledImage]:
    """Return the images of files and folders, in the order given, folders sorted by name.

    In a folder, files count by suffix and hidden ones do not; with `recursive`, folders below
    too, links followed. The first folder below the one given is the label (`FOLDER/cat/1.jpg`,
    `FOLDER/cat/old/2.jpg`: cat); an image beside the class folders, or named outright, has none.
    Names that come twice count once.
    Raises: UsageError for a missing path, an unreadable folder, or one without an image.
    """
    found: dict[Path, LabelledImage] = {}
    for path in paths:
        for image in _images_at(path, recursive):
            found.setdefault(image.path, image)
    return list(found.values())


def _images_at(path: Path, recursive: bool) -> list[LabelledImage]:
    if not os.path.isdir(path):
        if not os.path.exists(path):
            raise UsageError(f"{path}: no such file or folder. Check the path.")
        return [LabelledImage(path)]
    images = []
    for file in _walk(path, recursive, frozenset()):
        below = file.relative_to(path).parts
        images.append(LabelledImage(file, below[0] if len(below) > 1 else None))
    if not images:
        raise UsageError(
            f"{path}: no image in this folder (expected files that end in "
            f"{', '.join(SUFFIXES)}). Name another folder, or a file outright."
        )
    return images


def _walk(folder: Path, recursive: bool, above: frozenset[str]) -> Iterator[Path]:
    """Yield the images below a folder by name; `above` ends loops of links."""
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        with os.scandir(folder) as listing:
            entries = sorted((entry.name, entry.is_dir()) for entry in listing)
    except OSError as error:
        raise UsageError(
            f"{folder}: cannot be listed ({error.strerror}). Check its permissions."
        ) from error
    for name, is_folder in entries:
        if name.startswith("."):
            continue
        if is_folder and recursive:
            yield from _walk(folder / name, recursive, above | {real})
        elif not is_folder and name.lower().endswith(SUFFIXES):
            yield folder / name
