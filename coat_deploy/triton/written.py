"""What a repository says of the files that were written into it, so that no others are touched.

`NAME/coat-deploy.json` lists every file of the model's folders with its digest. Triton reads
nothing but config.pbtxt and the folders of versions.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from coat_deploy.digest import sha256_file
from coat_deploy.errors import RepositoryError, UsageError
from coat_deploy.json_files import json_bytes, read_json

RECORD = "coat-deploy.json"
_CACHES = "__pycache__"


def record_bytes(about: Mapping[str, Any], files: Mapping[str, str]) -> bytes:
    """Return the record of `files`, digests by their names below the repository."""
    return json_bytes({**about, "files": dict(files)})


def own_files(out: Path, names: Sequence[str]) -> list[str]:
    """Return the files in the folders `names` of a repository, all as they were written.

    The first folder has the record of all.
    Raises: UsageError for a folder or a file that is another's, or was changed.
    """
    record = f"{names[0]}/{RECORD}"
    listed: Mapping[str, Any] = {}
    if (out / record).is_file():
        document = read_json(out / record, RepositoryError)
        files = document.get("files") if isinstance(document, dict) else None
        listed = files if isinstance(files, dict) else {}
    found = sorted(file for name in names for file in _files(out, name))
    for file in found:
        if file == record:
            continue
        digest = listed.get(file)
        if digest is None or not (out / file).is_file() or sha256_file(out / file) != digest:
            what = "is not of" if digest is None else "was changed since"
            raise UsageError(
                f"{out / file}: is in the way: it {what} an earlier coat-deploy triton. Move it "
                "away, or choose another folder with --out or another name with --as."
            )
    return found


def check_root(out: Path) -> None:
    """Raise UsageError where Triton could not serve the folder, for what else is in it."""
    if os.path.lexists(out) and not out.is_dir():
        raise UsageError(f"{out}: is not a folder. Choose another with --out.")
    if not out.is_dir():
        return
    try:
        with os.scandir(out) as listing:
            folders = sorted(e.name for e in listing if e.is_dir() and e.name[0] != ".")
    except OSError as error:
        raise UsageError(f"{out}: cannot be listed ({error.strerror}).") from error
    for name in folders:
        if not os.path.isfile(out / name / "config.pbtxt"):
            raise UsageError(
                f"{out}: is not a repository of Triton's (it holds {name!r}, which has no "
                "config.pbtxt). Choose an empty folder, or a new one, with --out."
            )


def _files(out: Path, name: str) -> Iterator[str]:
    """Yield what is in a folder of the repository, by names below the repository."""
    if os.path.islink(out / name):
        yield name  # whatever it points to
        return
    for folder, _, files in os.walk(out / name):
        if os.path.basename(folder) != _CACHES:  # the server's Python leaves these
            yield from (str((Path(folder) / file).relative_to(out)) for file in files)
