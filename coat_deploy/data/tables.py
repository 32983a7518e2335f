"""Labelled images in tables: of the Hugging Face Hub, parquet files, WebDataset tars.

`datasets` finds, fetches, caches and streams; it never decodes, so that images meet the same
limits and the same orientation as everywhere. Read whole, a table is copied once into the
library's cache (`$HF_DATASETS_CACHE`), where later runs and other processes find it.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from coat_deploy.data.classes import Classes
from coat_deploy.data.columns import classify, find_image_column, find_label_column, spell
from coat_deploy.data.data_files import count_in_tars
from coat_deploy.data.dataset import Dataset, Splits
from coat_deploy.data.huggingface import (
    WEBDATASET,
    Table,
    count_rows,
    opened,
    plainly,
    read_address,
)
from coat_deploy.data.options import TRAIN_SPLIT, DataOptions
from coat_deploy.data.rows import Fetch, Rows, RowStream
from coat_deploy.data.split import PARTS, hold_back, pick_part
from coat_deploy.errors import UsageError, unknown_name

_READ_AT_ONCE = 16


def open_table(table: Table, options: DataOptions) -> Splits:
    """Return what to train on and what to measure with; with `options.streaming` a stream.

    Where there is no split to measure with, a share of each class is held back.
    Raises: UsageError for a split or a column that is not there, for images without a label, for
        a stream without a split to measure with, and for what cannot be read; DownloadError for
        the hub out of reach; BackendMissing without the package datasets.
    """
    with opened(table, options.streaming) as (library, builder):
        tables = _Tables(library, builder, table, options)
        measured = options.measured(tables.names)
        if options.streaming:
            if measured is None:
                raise UsageError(
                    f"{table.given}: has no split to measure with, and of a stream none can be "
                    f"held back (got {', '.join(tables.names)}). Name one, or do not stream."
                )
            return Splits(*tables.stream(measured))
        if measured is None:
            return Splits(*tables.in_two())
        return Splits(tables.rows(tables.train_split), tables.rows(measured))


def open_table_split(table: Table, split: str | None, options: DataOptions) -> Dataset:
    """Return one split by name; None is what to measure with, or every image where that is none.

    Without a split to measure with, `train` and `validation` are the parts of `open_table`. With
    `options.streaming` only the split's own files are fetched; without, every split's, which are
    then there without a network, too.
    Raises: as `open_table`.
    """
    with opened(table, options.streaming) as (library, builder):
        tables = _Tables(library, builder, table, options)
        measured = options.measured(tables.names)
        if measured is None and split in PARTS:
            return pick_part(tables.in_two(), split, table.given)
        return tables.rows(split or measured or tables.train_split)


@dataclass(frozen=True)
class _Tables:
    """A table in the hands of the library, whose `builder` knows its files."""

    library: Any
    builder: Any
    table: Table
    options: DataOptions

    @property
    def names(self) -> list[str]:
        """Names of the splits."""
        # What was prepared earlier and is opened without a network has no files any more.
        return list(self.builder.config.data_files or self.builder.info.splits or ())

    @property
    def train_split(self) -> str:
        """Name of the split to train on: as asked for, the usual one, or the only one."""
        only = self.names[0] if len(self.names) == 1 else TRAIN_SPLIT
        return self.options.train_split or only

    def rows(self, split: str) -> Rows:
        """Return a split as a table on disk."""
        return self._as_rows(self._table(split), split)

    def in_two(self) -> tuple[Dataset, Dataset]:
        """Return all that is trained on in two parts, the second held back to measure with."""
        share, seed = self.options.validation_share, self.options.seed
        return hold_back(self.rows(self.train_split), share, seed, self.table.given)

    def stream(self, measured: str) -> tuple[RowStream, Rows]:
        """Return the training split as a stream, and the other as a table.

        Labels without names of their own take those that the other split has.
        """
        name = self.train_split
        self._check(name)
        table = self._table(measured)
        with plainly(self.table):
            rows = self.builder.as_streaming_dataset(split=name)
        image, label = self._columns(rows, name)
        wanted = self.options.label_names
        spelled = spell(rows.features[label], _arrow(table, label).to_pylist(), wanted)
        rows = self._encoded(rows, image).select_columns([image, label])
        stream = RowStream(
            functools.partial(_epoch, self.table, self.options, rows),
            image,
            label,
            Classes.of(spelled, wanted),
            self._length(name, image),
            name,
            self._fetch,
        )
        return stream, self._as_rows(table, measured)

    def _as_rows(self, table: Any, split: str) -> Rows:
        image, label = self._columns(table, split)
        values = _arrow(table, label).to_pylist()
        classes = Classes.of(spell(table.features[label], values, self.options.label_names))
        labels = classify(values, classes, f"{self.table.given} ({split})")
        images = self._encoded(table, image).select_columns([image])
        paths = _paths(_arrow(images, image))
        return Rows(images, image, paths, labels, classes.names, split, self._fetch)

    def _table(self, split: str) -> Any:
        """Return a split as the library holds it on disk; of a stream, fetch no other for it."""
        self._check(split)
        with plainly(self.table):
            if not self.options.streaming:
                if not self.builder.info.splits[split].num_examples:
                    raise UsageError(f"{self.table.given} ({split}): no images (0 rows).")
                return self.builder.as_dataset(split=split)
            return self.library.load_dataset(
                self.table.module,
                self.table.configuration,
                data_files={split: self.builder.config.data_files[split]},
                features=self.builder.info.features,
                split=split,
                verification_mode="no_checks",  # which misses the other splits
            )

    def _check(self, split: str) -> None:
        if split not in self.names:
            raise UsageError(f"{self.table.given}: {unknown_name('split', split, self.names)}")

    def _columns(self, table: Any, split: str) -> tuple[str, str]:
        features, subject = table.features or {}, f"{self.table.given} ({split})"
        image = find_image_column(features, self.options.image_column, subject)
        return image, find_label_column(features, self.options.label_column, subject)

    def _encoded(self, table: Any, image: str) -> Any:
        """Return a table whose images stay as they are in the file."""
        if not isinstance(table.features[image], self.library.Image):
            return table
        return table.cast_column(image, self.library.Image(decode=False))

    def _length(self, split: str, image: str) -> int | None:
        """Return the rows of a split to be streamed: as asked for, as told, or as counted."""
        if self.options.stream_length is not None:
            return self.options.stream_length
        if self.table.files is None:
            told = (self.builder.info.splits or {}).get(split)
            return (told.num_examples or None) if told else None
        files = self.table.files[split]
        return count_in_tars(files, image) if self.table.kind == WEBDATASET else count_rows(files)

    @property
    def _fetch(self) -> Fetch | None:
        """What reads an address in a row; for a source on this machine nothing does."""
        return functools.partial(read_address, self.table) if self.table.files is None else None


def _epoch(
    table: Table, options: DataOptions, rows: Any, epoch: int
) -> Iterator[Mapping[str, Any]]:
    """Yield the rows of an epoch of a stream, shuffled by the seed and the epoch alone."""
    order = np.random.default_rng((options.seed, epoch))
    shuffled = rows.shuffle(generator=order, buffer_size=options.shuffle_buffer)
    with plainly(table):
        # Iterated row by row, it would deal rows out among the workers of a DataLoader.
        for batch in shuffled.iter(batch_size=_READ_AT_ONCE):
            for values in zip(*batch.values(), strict=True):
                yield dict(zip(batch, values, strict=True))


def _arrow(table: Any, column: str) -> Any:
    """Return a column as Arrow holds it, mapped from disk."""
    return table.select_columns([column]).with_format("arrow")[:].column(column)


def _paths(images: Any) -> Any:
    """Return what each image was called, as an Arrow column; None where that is not told."""
    index = images.type.get_field_index("path") if hasattr(images.type, "get_field_index") else -1
    paths = images.flatten()[index] if index >= 0 else None
    return None if paths is None or paths.null_count == len(paths) else paths
