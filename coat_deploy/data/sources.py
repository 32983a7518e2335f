"""Labelled images by what was given to `--data`.

    digits                        scikit-learn's handwritten digits
    FOLDER                        class folders, or splits of them: see `folders`
    hub:OWNER/NAME[:CONFIG]       a data set of the Hugging Face Hub
    parquet:PATH                  a file, a folder's files, or a glob
    webdataset:PATH               the same, of tar files

A folder that is called as one of the others is given as `./digits`.
"""

import os
import re
from pathlib import Path

from coat_deploy.data.classes import check_to_train, relabel
from coat_deploy.data.data_files import find_data_files
from coat_deploy.data.dataset import Dataset, Splits, Stream
from coat_deploy.data.digits import NAME as DIGITS
from coat_deploy.data.digits import open_digits
from coat_deploy.data.folders import open_folder, open_folder_split
from coat_deploy.data.huggingface import HUB, PARQUET, WEBDATASET, Table
from coat_deploy.data.options import DataOptions
from coat_deploy.data.split import pick_part
from coat_deploy.data.tables import open_table, open_table_split
from coat_deploy.errors import UsageError, unknown_name

__all__ = ["DataOptions", "open_split", "open_splits"]

KNOWN = (DIGITS, "FOLDER", f"{HUB}:OWNER/NAME[:CONFIG]", f"{PARQUET}:PATH", f"{WEBDATASET}:PATH")

_DEFAULTS = DataOptions()
_SUFFIXES = {PARQUET: (".parquet",), WEBDATASET: (".tar",)}
_REPOSITORY = re.compile(r"(?P<repository>[\w.-]+/[\w.-]+)(:(?P<configuration>.+))?", re.ASCII)


def open_splits(source: str, options: DataOptions = _DEFAULTS) -> Splits:
    """Return what to train on and what to measure with; `source` as given to `--data`.

    Images are decoded when they are asked for, so a corrupt one is not found here.
    Raises: UsageError for an unknown source, split or column, for no images, a single class, an
        empty class, and classes that differ between the splits; DownloadError for the hub out of
        reach; BackendMissing for a package that is not installed.
    """
    found = _open(source, options)
    train, validation = found.train, found.validation
    assert validation is not None
    if isinstance(train, Stream):
        # Which classes a stream has is not known before its end.
        check_to_train(validation, validation, source)
    else:
        check_to_train(train, validation, source)
        train = relabel(train, options.label_names, source)
    return Splits(train, relabel(validation, options.label_names, source))


def open_split(source: str, split: str | None = None, options: DataOptions = _DEFAULTS) -> Dataset:
    """Return one split of a source, to measure a model with.

    None is the split that a training is measured with, or every image where there is no such
    split. The parts that a training would make of it then are called `train` and `validation`.
    Raises: as `open_splits`, but for classes: those that are there will do.
    """
    place = _place(source, options)
    if place is None:
        found = pick_part(open_digits(), split, source)
    elif isinstance(place, Path):
        found = open_folder_split(place, split, options)
    else:
        found = open_table_split(place, split, options)
    return relabel(found, options.label_names, source)


def _open(source: str, options: DataOptions) -> Splits:
    place = _place(source, options)
    if place is None:
        return Splits(*open_digits())
    return open_folder(place, options) if isinstance(place, Path) else open_table(place, options)


def _place(source: str, options: DataOptions) -> Path | Table | None:
    """Return the folder or the table that is meant, or None for the digits."""
    kind, _, rest = source.partition(":")
    if rest and kind == HUB:
        return _on_hub(source, rest)
    if rest and kind in _SUFFIXES:
        names = (options.train_split, options.validation_split)
        return Table(source, kind, files=find_data_files(rest, _SUFFIXES[kind], source, names))
    _refuse_columns(source, options)
    if source == DIGITS:
        return None
    folder = os.path.expanduser(source)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise UsageError(f"{source}: not a folder. Give the folder that the class folders lie in.")
    raise UsageError(
        f"{unknown_name('data source', source, KNOWN)} No folder of this name, either."
    )


def _on_hub(source: str, name: str) -> Table:
    parts = _REPOSITORY.fullmatch(name)
    if parts is None:
        raise UsageError(
            f"{source}: not a data set's name (expected {HUB}:OWNER/NAME or "
            f"{HUB}:OWNER/NAME:CONFIG). Write it as its page on the hub is called."
        )
    return Table(source, HUB, parts["repository"], parts["configuration"])


def _refuse_columns(source: str, options: DataOptions) -> None:
    if options.streaming:
        raise UsageError(
            f"{source}: cannot be streamed (expected {', '.join(KNOWN[2:])}). "
            "Do not stream it: its images are decoded as they are needed anyway."
        )
    if column := options.image_column or options.label_column:
        raise UsageError(
            f"{source}: has no columns, so no '{column}' (expected {', '.join(KNOWN[2:])}). "
            "Leave the column out."
        )
