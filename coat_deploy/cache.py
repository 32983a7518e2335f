"""The user's cache folder, and what runtimes compiled, kept in it so that the next start is fast.

What is kept is never needed: that which cannot be read, is damaged, or cannot be written is as if
it had never been there, and nothing here raises for it.
"""

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

from coat_deploy.digest import sha256_bytes

_log = logging.getLogger(__name__)

MAX_KEPT_BYTES = 1 << 30
"""Most that is kept of a target; what was not used for longest goes first. A compiled coat_tiny
takes 28 MB, the largest variant 180."""

SUFFIX = ".compiled"
"""Of the files that hold what was compiled."""

_DIGEST_BYTES = 32


def default_cache_dir() -> Path:
    """Return `$COAT_CACHE`, or `coat-deploy` in the user's cache folder (XDG)."""
    if chosen := os.environ.get("COAT_CACHE"):
        return Path(chosen).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "coat-deploy"


def compiled_folder(target: str, files: Mapping[str, str]) -> Path | None:
    """Return the folder for what `target` compiles of an artifact; None for a user without a home.

    `files` maps names to digests: another content is another folder. It is made when needed.
    """
    content = json.dumps(sorted(files.items()))
    try:
        return default_cache_dir() / target / sha256_bytes(content.encode())
    except RuntimeError as error:  # "~" leads nowhere
        _log.info("no cache: %s", error)
        return None


def read_kept(path: Path) -> bytes | None:
    """Return what `keep` wrote to `path`, to the bit; None where it is not there or damaged."""
    try:
        with path.open("rb") as file:
            digest, content = file.read(_DIGEST_BYTES), file.read(MAX_KEPT_BYTES)
    except OSError as error:
        if not isinstance(error, FileNotFoundError):
            _log.info("%s: not read (%s)", path, error.strerror)
        return None
    if _digest(content) != digest:
        _log.info("%s: damaged; ignored", path)
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # used just now
    return content


def keep(path: Path, *parts: bytes | memoryview) -> None:
    """Write `parts` to `path` as one, whole or not at all; it is in a folder of `compiled_folder`.

    Of all that is kept of the target, what was not used for longest makes room for it.
    """
    folder, shelf = path.parent, path.parent.parent
    try:
        shelf.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.mkdir(exist_ok=True)
        handle, part = tempfile.mkstemp(prefix=".part-", dir=folder)
        try:
            with open(handle, "wb") as file:
                file.write(_digest(*parts))
                file.writelines(parts)
            os.replace(part, path)
        except BaseException:
            os.unlink(part)
            raise
        _make_room(shelf)
    except OSError as error:
        _log.info("%s: not kept (%s)", path, error.strerror)


def holds_kept(folder: Path) -> bool:
    """Return whether anything is kept in `folder`."""
    return any(folder.glob(f"*{SUFFIX}"))


def forget(folder: Path) -> None:
    """Remove what is kept in `folder`, so that the next load compiles anew."""
    for path in folder.glob(f"*{SUFFIX}"):
        with contextlib.suppress(OSError):
            path.unlink()


def _digest(*parts: bytes | memoryview) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()


def _make_room(shelf: Path) -> None:
    """Remove what was not used for longest, until the rest is within `MAX_KEPT_BYTES`."""
    found = []
    for path in shelf.glob("*/*"):
        with contextlib.suppress(OSError):  # another process makes room, too
            state = path.stat()
            found.append((state.st_mtime_ns, state.st_size, path))
    excess = sum(size for _, size, _ in found) - MAX_KEPT_BYTES
    for _, size, path in sorted(found):
        if excess <= 0:
            return
        with contextlib.suppress(OSError):
            path.unlink()
            excess -= size
            path.parent.rmdir()
