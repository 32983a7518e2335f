"""Labelled images in the rows of a table, however it is stored."""

import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from coat_deploy.data.classes import Classes
from coat_deploy.data.dataset import Sample
from coat_deploy.errors import ImageError
from coat_deploy.images import decode

_log = logging.getLogger(__name__)

Fetch = Callable[[str], bytes]
"""Reads the file at an address, for rows that name their image instead of holding it."""


@dataclass(frozen=True, eq=False)
class Rows:
    """A table on disk. `table[i]` is a row; `paths` has what each image was called, if told."""

    table: Sequence[Mapping[str, Any]]
    column: str
    paths: Sequence[Any] | None
    labels: npt.NDArray[np.int64]
    label_names: tuple[str, ...]
    split: str
    fetch: Fetch | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return the split, the row and the path of an image, without reading it."""
        path = self.paths[index].as_py() if self.paths is not None else None
        return f"{self.split}[{index}]" + (f" ({path})" if path else "")

    def image(self, index: int) -> Image.Image:
        """Decode an image: upright 8-bit RGB. Raises: ImageError naming its row and path."""
        return decode_cell(self.table[index][self.column], self.name(index), self.fetch)


@dataclass(frozen=True, eq=False)
class RowStream:
    """A table read from its start to its end. `rows` yields those of an epoch, in its order."""

    rows: Callable[[int], Iterable[Mapping[str, Any]]]
    image_column: str
    label_column: str
    classes: Classes
    length: int | None
    split: str
    fetch: Fetch | None = None
    _told: set[int] = field(default_factory=set)

    @property
    def label_names(self) -> tuple[str, ...]:
        """Name of each class."""
        return self.classes.names

    def samples(
        self, epoch: int, shard: int = 0, shards: int = 1, skip: int = 0
    ) -> Iterator[Sample]:
        """Yield every `shards`-th sample from `shard` on, after `skip` of them.

        Every shard reads all rows, and decodes its own. In the place of a corrupt image comes
        the next readable one, which then comes twice: the others keep their places without a
        skipped image being decoded. Those at the very end are left out.
        Raises: UsageError for a label that is no class, DownloadError for a connection that
            breaks.
        """
        assert 0 <= shard < shards and skip >= 0
        corrupt = 0
        rows = itertools.islice(enumerate(self.rows(epoch)), shard + skip * shards, None, shards)
        for place, row in rows:
            cell = row[self.image_column]
            name = self._name(cell, epoch, place)
            label = self.classes.find(row[self.label_column], name)
            try:
                image = decode_cell(cell, name, self.fetch)
            except ImageError as error:
                self._tell(cell, error)
                corrupt += 1
                continue
            yield from itertools.repeat(Sample(image, label, name), 1 + corrupt)
            corrupt = 0

    def _name(self, cell: Any, epoch: int, place: int) -> str:
        _, path = _bytes_and_path(cell)
        return f"{self.split} ({path})" if path else f"{self.split}, image {place} of epoch {epoch}"

    def _tell(self, cell: Any, error: ImageError) -> None:
        content = hash(_bytes_and_path(cell))
        if content not in self._told:
            self._told.add(content)
            _log.warning("skipped: %s", error)


def decode_cell(cell: Any, name: str, fetch: Fetch | None = None) -> Image.Image:
    """Return the image of a cell: its bytes, or a mapping with `bytes` or else a `path`.

    Raises: ImageError for a corrupt image, an empty cell, or an address without `fetch`.
    """
    data, path = _bytes_and_path(cell)
    if data is not None:
        return decode(data, name)
    if not path:
        raise ImageError(f"{name}: holds no image. Remove the row, or fill it in.")
    if "://" not in path:
        return decode(Path(path), name)
    if fetch is None:
        raise ImageError(
            f"{name}: lies elsewhere, and nothing is fetched for a source on this machine. "
            "Fetch the image, or remove the row."
        )
    return decode(fetch(path), name)


def _bytes_and_path(cell: Any) -> tuple[bytes | None, str | None]:
    return (cell.get("bytes"), cell.get("path")) if isinstance(cell, Mapping) else (cell, None)
