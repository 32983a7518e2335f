"""Files of tables on this machine: found by path, folder or glob, and told apart by split."""

import glob
import itertools
import os
import re
import tarfile
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from coat_deploy.data.options import TRAIN_SPLIT, VALIDATION_SPLITS
from coat_deploy.errors import UsageError

FilesBySplit = dict[str, list[str]]


def find_data_files(
    pattern: str, suffixes: tuple[str, ...], subject: str, names: Iterable[str | None] = ()
) -> FilesBySplit:
    """Return the absolute paths of a file, of a folder's files, or of a glob, by split.

    In a folder, those with one of `suffixes` count, at any depth. A file's split is the first
    word of its path below the folder, or below the fixed part of the glob, that is the name of
    one: `train-00000-of-00002.parquet`, `shards/val/17.tar`. `names` are further names of
    splits. Where no path holds one, all files are the training split.
    Raises: UsageError where nothing is found, or only some files name a split.
    """
    if "://" in pattern:
        raise UsageError(
            f"{subject}: an address, where a path or a glob is expected. "
            "Name a data set of the Hugging Face Hub as hub:OWNER/NAME, or fetch the files."
        )
    base, files = _find(os.path.expanduser(pattern), suffixes)
    if not files:
        raise UsageError(
            f"{subject}: no such file (expected a file, a folder with files that end in "
            f"{' or '.join(suffixes)}, or a glob). Check the path."
        )
    known = {TRAIN_SPLIT, *VALIDATION_SPLITS, *filter(None, names)}
    found: FilesBySplit = {}
    unnamed: list[str] = []
    for file in files:
        split = _split_of(file.relative_to(base), known)
        (found.setdefault(split, []) if split else unnamed).append(str(file))
    if found and unnamed:
        raise UsageError(
            f"{unnamed[0]}: names no split, while other files of {subject} do "
            f"(got {', '.join(found)}). Rename it, or give a narrower glob."
        )
    return found or {TRAIN_SPLIT: unnamed}


def count_in_tars(files: Sequence[str], field: str) -> int:
    """Return how many members of tar files are called `KEY.field`, from their headers alone.

    Raises: UsageError for a file that is no whole tar.
    """
    count = 0
    for file in files:
        try:
            with tarfile.open(file) as archive:
                names = [PurePath(member.name).name for member in archive if member.isfile()]
        except (tarfile.TarError, EOFError, OSError) as error:
            raise UsageError(f"{file}: no whole tar file ({error}). Fetch it again.") from error
        count += sum(name.partition(".")[2] == field for name in names)
    return count


def _find(pattern: str, suffixes: tuple[str, ...]) -> tuple[Path, list[Path]]:
    """Return the folder whose name decides nothing, and the files below it."""
    path = Path(os.path.abspath(pattern))
    if path.is_file():
        return path.parent, [path]
    if path.is_dir():
        return path, sorted(f for f in path.rglob("*") if f.suffix in suffixes and f.is_file())
    matches = (Path(match) for match in glob.glob(str(path), recursive=True))
    fixed = Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts))
    return fixed, sorted(match for match in matches if match.is_file())


def _split_of(path: PurePath, known: set[str]) -> str | None:
    words = (word for part in path.parts for word in re.split(r"[-._ ]+", part))
    forms = (form for word in words for form in (word, word.rstrip("0123456789")))
    return next((form for form in forms if form in known), None)
