"""Change several files of a folder as one: afterwards all are new, or all are as before.

New files are made in a hidden folder aside, on the same file system, and renamed into place under
a lock. Before the first rename, the files to be replaced are kept in a hidden folder `.undo`; its
removal is the single step that makes the change final. Who comes upon an `.undo` later, when the
process that made it was killed, puts the old files back.

Locks are advisory (`flock`), and end with the process that holds them.
"""

import contextlib
import fcntl
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

from coat_deploy.errors import RepositoryError

_log = logging.getLogger(__name__)

STAGING = ".staging-"
UNDO = ".undo"
_JOURNAL, _OLD = "undo.json", "old"
MAX_JOURNAL_BYTES = 1 << 20


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn a failed write (no permission, no space) into one clear line."""
    try:
        yield
    except OSError as error:
        raise RepositoryError(
            f"{path}: cannot be written ({error.strerror or error}); what was there is unchanged. "
            "Free space or choose another folder."
        ) from error


def write_file(path: Path, data: bytes) -> None:
    """Write a file aside, down to the disk. Raises RepositoryError."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())


@contextlib.contextmanager
def aside(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder in `folder` to make files in; afterwards it is gone.

    `folder` is made if it is not there, and removed again if it stays empty. What killed
    processes left aside is cleared away.
    Raises: RepositoryError when the folder cannot be written.
    """
    with writing(folder):
        made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        with writing(folder):
            place, handle = _make_aside(folder)
        try:
            yield place
        finally:
            shutil.rmtree(place, ignore_errors=True)
            os.close(handle)
    finally:
        with contextlib.suppress(OSError):  # not empty: something was put there
            for path in made:
                path.rmdir()


def _make_aside(folder: Path, attempts: int = 3) -> tuple[Path, int]:
    """Make a folder aside; return it and the handle whose lock says that its maker lives."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with locked(folder):
            _clear_abandoned(folder)
            place = Path(tempfile.mkdtemp(prefix=STAGING, dir=folder))
            handle = os.open(place, os.O_RDONLY)
            _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return place, handle
    except FileNotFoundError:
        # Another process made the folder too, failed, and has just removed it.
        if attempts == 1:
            raise
        return _make_aside(folder, attempts - 1)


def _clear_abandoned(folder: Path) -> None:
    """Remove the folders aside whose makers are gone; the caller holds the lock of `folder`."""
    for place in folder.glob(f"{STAGING}*"):
        with contextlib.suppress(OSError):
            handle = os.open(place, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                if _lock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB):
                    _log.info("%s: removed, its process is gone", place)
                    shutil.rmtree(place, ignore_errors=True)
            finally:
                os.close(handle)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold `folder` against other processes, after undoing what one left half done.

    Raises: OSError when there is no folder; RepositoryError when it cannot be undone.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        _lock(handle, fcntl.LOCK_EX)
        if _undo(folder):
            _log.warning("%s: undid a change that was interrupted", folder)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, how: int) -> bool:
    """Lock an open folder; return False if another holds it, or the file system has no locks."""
    try:
        fcntl.flock(handle, how)
    except OSError as error:
        _log.debug("no lock: %s", error)
        return False
    return True


def settle(folder: Path) -> None:
    """Wait for a change of `folder` that is under way; undo one whose process is gone.

    Raises: RepositoryError when it cannot be undone.
    """
    if os.path.isdir(folder / UNDO):
        with writing(folder), locked(folder):
            pass


def move_in(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Move the files `names` of `source` to `folder`, in that order: all, or on an error none.

    Names are relative, as in "1/model.onnx", however deep. The caller holds the lock of `folder`.
    Raises: OSError.
    """
    try:
        _keep_old(source, folder, names)
        for name in names:
            os.replace(source / name, folder / name)
        for path in {(folder / name).parent for name in names}:
            _sync(path)
        # From here on the new files count.
        os.replace(folder / UNDO, source / "done")
    except BaseException:
        _undo(folder)
        raise


def _keep_old(source: Path, folder: Path, names: Sequence[str]) -> None:
    """Make `.undo`: the files that will be replaced, and a list of those that will be new."""
    undo = source / "undo"
    (undo / _OLD).mkdir(parents=True)
    replaced = [name for name in names if os.path.lexists(folder / name)]
    added = [name for name in names if name not in replaced]
    for name in replaced:
        kept = undo / _OLD / name
        kept.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(folder / name, kept, follow_symlinks=False)
        except OSError:  # a file system without hard links
            shutil.copy2(folder / name, kept, follow_symlinks=False)
    write_file(undo / _JOURNAL, json.dumps({"replaced": replaced, "added": added}).encode())
    os.replace(undo, folder / UNDO)
    _sync(folder)
    for name in added:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)


def _undo(folder: Path) -> bool:
    """Put back what a `.undo` keeps, remove what it lists as new; return whether there was one.

    An undoing that was interrupted itself may be repeated.

    Raises: RepositoryError.
    """
    undo = folder / UNDO
    if not os.path.isdir(undo):
        return False
    try:
        for name in _listed(undo, "replaced"):
            if os.path.lexists(undo / _OLD / name):
                os.replace(undo / _OLD / name, _inside(folder, name))
        for name in _listed(undo, "added"):
            _inside(folder, name).unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # not empty
                for parent in PurePosixPath(name).parents[:-1]:
                    (folder / parent).rmdir()
        _sync(folder)
        shutil.rmtree(undo)
    except (OSError, ValueError) as error:
        raise RepositoryError(
            f"{undo}: a change of this folder was interrupted, and cannot be undone ({error}). "
            "Run the command as a user who may write there."
        ) from error
    return True


def _listed(undo: Path, key: str) -> list[str]:
    """Return the names a journal lists. Raises ValueError when it is not one of ours."""
    path = undo / _JOURNAL
    if not path.is_file():
        return []  # an undoing that was interrupted after its work was done
    if path.stat().st_size > MAX_JOURNAL_BYTES:
        raise ValueError(f"{_JOURNAL} is too large")
    journal = json.loads(path.read_text(encoding="utf-8"))
    names = journal.get(key) if isinstance(journal, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{_JOURNAL} does not list what is {key}")
    return names


def _inside(folder: Path, name: str) -> Path:
    """Return a file of `folder` by a name that may be a stranger's. Raises ValueError."""
    path = PurePosixPath(name)
    sound = path.name and not path.is_absolute() and ".." not in path.parts
    if not sound or not (folder / path).parent.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{_JOURNAL} lists {name!r}")
    return folder / path


def _sync(folder: Path) -> None:
    """Ask for the entries of a folder to reach the disk, where the file system can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
