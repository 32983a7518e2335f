"""Fetch published checkpoints: cached, resumable, verified; nothing wrong ever lands in the cache.

Two places publish CoaT weights: the authors' server (`fetch_official`, the standard library's
HTTP) and the Hugging Face Hub (`fetch_hub`, in `hub.py`, the hub's own client and cache).
"""

import contextlib
import http.client
import logging
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from coat_deploy.cache import default_cache_dir
from coat_deploy.digest import sha256_file
from coat_deploy.errors import DownloadError, UsageError
from coat_deploy.network.variants import OFFICIAL_URL, Published
from coat_deploy.version import __version__

log = logging.getLogger(__name__)

Progress = Callable[[str, int, int | None], None]
"""Called with the file's name, bytes on disk so far, and bytes in all where the server says."""

MAX_FILE_BYTES = 2 * 1024**3
"""Largest checkpoint accepted: CoaT's largest is 180 MB, with its optimizer's state 540 MB."""

MAX_CONNECTIONS = 5
"""How often one call resumes a transfer that drops, before it leaves the rest to the next."""

CHUNK_BYTES = 1 << 18


@dataclass(frozen=True)
class DownloadOptions:
    """Where downloads come from and go to.

    cache_dir: files of the authors' server, and files put there by hand.
    offline: use what is cached, never the network.
    progress: told how far a transfer is.
    timeout_s: seconds without a byte after which a server counts as gone.
    official_url: the authors' server or a mirror of it, default `$COAT_OFFICIAL_URL`.
    hub_endpoint, hub_cache_dir: for the Hugging Face Hub; None leaves what its client chooses
        (`$HF_ENDPOINT`, `$HF_HOME`), so that weights timm has fetched are found.
    """

    cache_dir: Path = field(default_factory=default_cache_dir)
    offline: bool = False
    progress: Progress | None = None
    timeout_s: float = 30.0
    official_url: str = field(
        default_factory=lambda: os.environ.get("COAT_OFFICIAL_URL") or OFFICIAL_URL
    )
    hub_endpoint: str | None = None
    hub_cache_dir: Path | None = None


@dataclass(frozen=True)
class Download:
    """A published file on this machine: where it lies, where it came from, its full SHA-256."""

    path: Path
    url: str
    sha256: str


def fetch_official(published: Published, options: DownloadOptions) -> Download:
    """Return the authors' checkpoint, from the cache or fetched into it.

    The published name holds 8 digits of the hash: enough to detect damage, not to prove origin.

    Raises: DownloadError, in one line that says which file to fetch and where to put it, or
        that shows both hashes. What was transferred stays for the next call to resume.
    """
    url = f"{options.official_url.rstrip('/')}/{published.file}"
    if urlsplit(url).scheme not in ("http", "https"):
        raise UsageError(f"{url}: not an http or https address. Mend COAT_OFFICIAL_URL.")
    path = options.cache_dir / "official" / published.file
    # Before anything is written, so that a complete cache may be read-only.
    if digest := _cached(path, published.sha8):
        return Download(path, url, digest)
    if options.offline:
        raise unreachable(url, path, "offline")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            # Another process may have fetched it while this one waited.
            digest = _cached(path, published.sha8) or _fetch(url, path, published.sha8, options)
    except OSError as error:
        raise DownloadError(
            f"{path}: cannot be written ({error.strerror or error}). Free space there, or choose "
            "another folder with COAT_CACHE; what was transferred so far is kept."
        ) from error
    return Download(path, url, digest)


def unreachable(url: str, path: Path, reason: str) -> DownloadError:
    """Return the error for a file that cannot be had now, with both ways around it."""
    return DownloadError(
        f"{path.name}: cannot be fetched ({' '.join(reason.split())}). Fetch {url} on another "
        f"machine and save it as {path}, or give a file with --weights PATH."
    )


def _cached(path: Path, sha8: str) -> str | None:
    """Return the hash of an intact cached file; None if it is absent or damaged."""
    if not path.is_file():
        return None
    digest = sha256_file(path)
    if digest.startswith(sha8):
        return digest
    log.warning("%s: damaged in the cache (sha256 %s, expected %s...)", path, digest, sha8)
    return None


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the only right to fetch `path`; others wait for the holder, alive or dead.

    Without a lock (Windows) two processes could write one partial file: its hash would be
    wrong, and the download refused.
    """
    if sys.platform == "win32":
        yield
        return
    import fcntl

    # The lock file stays: removing it would let a third process lock a new one of that name.
    with path.with_name(path.name + ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("%s: waiting for another process that fetches it", path.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _fetch(url: str, path: Path, sha8: str, options: DownloadOptions) -> str:
    """Transfer into a partial file, verify it, and only then give it its name; return its hash."""
    part = path.with_name(path.name + ".part")
    while True:
        resumed = _transfer(url, part, path, options)
        digest = sha256_file(part)
        if digest.startswith(sha8):
            os.replace(part, path)
            return digest
        part.unlink()
        if not resumed:
            raise DownloadError(
                f"{path.name}: not the published file (got sha256 {digest}, expected {sha8}...). "
                f"{url} was changed or damaged on the way; try again, or --weights timm."
            )
        log.warning("%s: damaged where it was resumed; fetching all of it", path.name)


class _Dropped(Exception):
    """The connection ended before the file did."""


def _transfer(url: str, part: Path, path: Path, options: DownloadOptions) -> bool:
    """Bring `part` to its full length; return whether it was put together from pieces."""
    resumed = False
    for _ in range(MAX_CONNECTIONS):
        start = part.stat().st_size if part.exists() else 0
        try:
            return _stream(url, part, start, path, options) or resumed
        except _Dropped as error:
            reason = str(error)
            log.info("%s: %s; resuming", path.name, reason)
            resumed = True
    raise unreachable(url, path, f"{reason}; run again to resume")


def _stream(url: str, part: Path, start: int, path: Path, options: DownloadOptions) -> bool:
    """Append to `part` what the server sends from byte `start`; return whether it resumed."""
    try:
        response = _open(url, start, options.timeout_s)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416 and start:  # nothing beyond `start`: complete, as the hash will tell
            return True
        raise unreachable(url, path, f"HTTP {error.code} {error.reason}") from error
    except (OSError, http.client.HTTPException) as error:
        kept = f"; {start} bytes are kept to resume" if start else ""
        raise unreachable(url, path, f"{_reason(error)}{kept}") from error
    with response:
        resumed = response.status == 206
        if resumed and not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            part.unlink()
            raise _Dropped("the server sent another range than asked for")
        done = start if resumed else 0
        length = response.headers.get("Content-Length", "")
        total = done + int(length) if length.isdigit() else None
        if (total or 0) > MAX_FILE_BYTES:
            raise unreachable(url, path, f"{total} bytes, more than {MAX_FILE_BYTES} are no CoaT")
        # Unbuffered: whatever interrupts, the bytes in the file are the server's first ones.
        with part.open("ab" if resumed else "wb", buffering=0) as file:
            for chunk in _chunks(response, done, total):
                _write(file, chunk)
                done += len(chunk)
                if done > MAX_FILE_BYTES:
                    raise unreachable(url, path, f"more than {MAX_FILE_BYTES} bytes are no CoaT")
                if options.progress:
                    options.progress(path.name, done, total)
    return resumed


def _chunks(response: Any, done: int, total: int | None) -> Iterator[bytes]:
    """Yield what arrives as it arrives. Raises _Dropped when it ends before `total` bytes."""
    while True:
        try:
            chunk = response.read1(CHUNK_BYTES)
        except (OSError, http.client.HTTPException) as error:
            raise _Dropped(f"connection lost at {done} bytes: {_reason(error)}") from error
        if not chunk:
            break
        done += len(chunk)
        yield chunk
    if total is not None and done < total:
        raise _Dropped(f"connection closed at {done} of {total} bytes")


def _write(file: FileIO, chunk: bytes) -> None:
    """Write all of `chunk` to an unbuffered file, which may take it in several bites."""
    view = memoryview(chunk)
    while view:
        view = view[file.write(view) :]


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, but never from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise urllib.error.URLError(f"redirected from https to {newurl}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str, start: int, timeout_s: float) -> Any:
    """Send the request for a file from byte `start`, over http and https only."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    headers = {"User-Agent": f"coat-deploy/{__version__}", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    return opener.open(urllib.request.Request(url, headers=headers), timeout=timeout_s)


def _reason(error: Exception) -> str:
    """Return why a connection failed, in a few words."""
    cause = getattr(error, "reason", None) or error
    return getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
