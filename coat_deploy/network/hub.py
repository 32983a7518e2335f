"""Fetch timm's conversions of the published weights from the Hugging Face Hub.

The hub's own client does the work: it caches in the folder that timm uses too, resumes a transfer
that drops, and honours mirrors, tokens and proxies. Added here: its failures in one line, its
progress handed on, and the hash of what it cached.
"""

import logging
import re
from pathlib import Path
from typing import Any, Self

from coat_deploy.digest import sha256_file
from coat_deploy.errors import BackendMissing, DownloadError
from coat_deploy.network.download import Download, DownloadOptions, Progress, unreachable

log = logging.getLogger(__name__)

HUB_FILE = "model.safetensors"


def fetch_hub(repository: str, options: DownloadOptions) -> Download:
    """Return `model.safetensors` of a hub repository ("timm/coat_tiny.in1k").

    A file put by hand at `<cache_dir>/<repository>.safetensors` is taken first.

    Raises: DownloadError, in one line that says which file to fetch and where to put it, or
        that shows both hashes; BackendMissing without the package huggingface_hub.
    """
    try:
        from huggingface_hub import hf_hub_url
    except ImportError as error:
        raise BackendMissing(
            "weights source timm: package huggingface_hub is not installed. "
            'Run: pip install "coat-deploy[torch]".'
        ) from error
    url = hf_hub_url(repository, HUB_FILE, endpoint=options.hub_endpoint)
    placed = options.cache_dir / f"{repository}.safetensors"
    if placed.is_file():
        return Download(placed, url, sha256_file(placed))
    for force in (False, True):
        path = _download(repository, url, placed, options, force=force)
        digest, published = sha256_file(path), _published_digest(path)
        if published in (None, digest):
            return Download(path, url, digest)
        log.warning("%s: damaged in the hub's cache; fetching it again", path)
    raise DownloadError(
        f"{repository}: damaged file {path} (got sha256 {digest}, expected {published}). "
        "Remove it and try again, or give a file with --weights PATH."
    )


def _download(
    repository: str, url: str, placed: Path, options: DownloadOptions, *, force: bool
) -> Path:
    """Call the hub's client; every failure becomes one line."""
    from huggingface_hub import hf_hub_download

    failure = _unreachable_because(url, options)
    try:
        path = hf_hub_download(
            repository,
            HUB_FILE,
            endpoint=options.hub_endpoint,
            cache_dir=options.hub_cache_dir,
            local_files_only=failure is not None,
            force_download=force and failure is None,
            etag_timeout=_patience_s(options),
            tqdm_class=_progress_class(repository, options.progress),
        )
    # The client lets through what its HTTP library raises, and changed that library twice.
    except Exception as error:
        raise unreachable(url, placed, failure or _reason(error)) from error
    return Path(path)


def _unreachable_because(url: str, options: DownloadOptions) -> str | None:
    """Return why the hub cannot be reached; None if it can.

    Asked before the download, because that retries for half a minute before it gives up.
    """
    from huggingface_hub import get_hf_file_metadata

    if options.offline:
        return "offline"
    try:
        get_hf_file_metadata(url, timeout=_patience_s(options))
    except Exception as error:
        return _reason(error)
    return None


def _patience_s(options: DownloadOptions) -> float:
    """Return how long to wait for an answer that holds no data."""
    return min(10.0, options.timeout_s)


def _published_digest(path: Path) -> str | None:
    """Return the SHA-256 the hub stated: its cache names large files by it."""
    name = path.resolve().name
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def _reason(error: Exception) -> str:
    """Return the first sentence of the error that began it."""
    while error.__cause__ is not None and isinstance(error.__cause__, Exception):
        error = error.__cause__
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]


def _progress_class(name: str, progress: Progress | None) -> Any:
    """Return what the hub's client takes for a tqdm bar: prints nothing, calls `progress`.

    The client may count the same bytes twice, as received and as written: the larger is told.
    """
    told = 0

    class Bar:
        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, **__: Any) -> None:
            self.total = total
            self.n = initial

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def update(self, count: int = 1) -> None:
            nonlocal told
            self.n += count
            if progress and self.n > told:
                told = self.n
                progress(name, told, self.total)

        def set_postfix_str(self, *_: Any, **__: Any) -> None:
            pass

        def refresh(self) -> None:
            pass

        def close(self) -> None:
            pass

    return Bar
