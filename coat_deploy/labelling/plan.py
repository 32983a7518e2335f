"""A plan: which images are labelled as one, written once and never changed.

An Arrow file of one column, a record batch a part, so that a part is read without the others.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coat_deploy.errors import RepositoryError

COLUMN = "path"
FEWEST, MOST, PARTS = 16, 512, 64
"""Images a part: as many as make `PARTS` parts, within these bounds."""


def part_size(images: int) -> int:
    """Return how many images to label as one, of so many in all.

    A part is what a killed worker loses, and what workers divide among them.
    """
    return min(MOST, max(FEWEST, images // PARTS))


def plan_bytes(paths: Sequence[str], size: int) -> bytes:
    """Return a plan of `paths`, `size` a part."""
    import pyarrow as pa

    content = pa.BufferOutputStream()
    schema = pa.schema([(COLUMN, pa.string())])
    with pa.ipc.new_file(content, schema) as file:
        for start in range(0, len(paths), size):
            file.write_batch(pa.record_batch([list(paths[start : start + size])], schema=schema))
    return bytes(content.getvalue().to_pybytes())


def read_sizes(file: Path) -> list[int]:
    """Return how many images each part of a plan has. Raises RepositoryError."""
    opened = _opened(file)
    return [opened.get_batch(index).num_rows for index in range(opened.num_record_batches)]


def read_part(file: Path, index: int) -> list[str]:
    """Return the paths of a part. Raises RepositoryError."""
    return list(_opened(file).get_batch(index).column(COLUMN).to_pylist())


def read_plan(file: Path) -> Iterator[str]:
    """Yield all paths of a plan. Raises RepositoryError."""
    opened = _opened(file)
    for index in range(opened.num_record_batches):
        yield from opened.get_batch(index).column(COLUMN).to_pylist()


def _opened(file: Path) -> Any:
    import pyarrow as pa

    try:
        return pa.ipc.open_file(pa.memory_map(str(file)))
    except (OSError, ValueError) as error:  # pyarrow's own errors are one of these
        raise RepositoryError(
            f"{file}: not a whole plan ({error}). Label into a new folder."
        ) from error
