"""Hugging Face `datasets` at work: quiet, one line where it fails, no network where none is due.

Code that comes with a data set is never run. Sources on this machine are read without the
network.
"""

import contextlib
import glob
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from coat_deploy.data.data_files import FilesBySplit
from coat_deploy.errors import BackendMissing, CoatDeployError, DownloadError, UsageError
from coat_deploy.images import DEFAULT_LIMITS

_log = logging.getLogger(__name__)

HUB, PARQUET, WEBDATASET = "hub", "parquet", "webdataset"
"""Kinds of tables."""

_PATIENCE_S = 10.0
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Table:
    """A source of rows: a data set of the hub, or files of one kind.

    given: the source as the user wrote it.
    kind: HUB, PARQUET or WEBDATASET.
    repository, configuration: of the hub, OWNER/NAME and a name or None.
    files: elsewhere, by split.
    """

    given: str
    kind: str
    repository: str = ""
    configuration: str | None = None
    files: FilesBySplit | None = None

    @property
    def module(self) -> str:
        """What `datasets` calls it; the address says that no folder of this name is meant."""
        return self.kind if self.files else f"hf://datasets/{self.repository}"


@contextlib.contextmanager
def opened(table: Table, streaming: bool) -> Iterator[tuple[Any, Any]]:
    """Hand out the library and what it calls a builder, of a table fetched whole or to be streamed.

    Inside, the library keeps quiet.
    Raises: BackendMissing without the package datasets; else as `plainly`.
    """
    library = _import(table)
    offline = _unreachable(table)
    with _hushed(library, offline is not None or table.files is not None):
        with plainly(table, offline):
            files = table.files and {
                split: [glob.escape(file) for file in paths] for split, paths in table.files.items()
            }
            builder = library.load_dataset_builder(
                table.module, table.configuration, data_files=files
            )
            if not streaming:
                _log.info("%s: preparing", table.given)
                builder.download_and_prepare()
            elif not builder.config.data_files:
                raise ConnectionError("what was fetched earlier cannot be streamed")
            elif hasattr(builder.config, "decode_num_threads"):
                builder.config.decode_num_threads = 0  # it would decode ahead
        yield library, builder


def _import(table: Table) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import datasets
    except ImportError as error:
        raise BackendMissing(
            f"{table.given}: package datasets is not installed. "
            'Run: pip install "coat-deploy[datasets]".'
        ) from error
    return datasets


@contextlib.contextmanager
def _hushed(library: Any, offline: bool) -> Iterator[None]:
    """Keep the library from printing, and if need be from the network.

    All of that is global to it: what the user has set is put back.
    """
    from huggingface_hub import utils as hub

    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    with contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        for bars in (library, hub):
            if not bars.are_progress_bars_disabled():
                stack.callback(bars.enable_progress_bars)
                bars.disable_progress_bars()
        stack.callback(setattr, library.config, "HF_HUB_OFFLINE", library.config.HF_HUB_OFFLINE)
        library.config.HF_HUB_OFFLINE |= offline
        yield


@contextlib.contextmanager
def plainly(table: Table, offline: str | None = None) -> Iterator[None]:
    """Turn what the library and those below it raise into one line.

    It raises what it stumbles over: its own errors, those of Arrow, of files and of connections.
    """
    try:
        yield
    except CoatDeployError:
        raise
    except Exception as error:
        reason = _reason(error)
        if table.files is None and (offline or _is_network(error)):
            raise DownloadError(
                f"{table.given}: cannot be fetched ({offline or reason}). Connect to the network, "
                f"or run `hf download --repo-type dataset {table.repository} --local-dir FOLDER` "
                "where there is one and give its files, for example as parquet:FOLDER."
            ) from error
        raise UsageError(f"{table.given}: cannot be read ({reason}). Check the source.") from error


def _unreachable(table: Table) -> str | None:
    """Return why the hub cannot be reached; None if it can, or need not be.

    Asked before anything else, because the library tries for half a minute before it gives up.
    """
    if table.files is not None:
        return None
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    url = hf_hub_url(table.repository, "README.md", repo_type="dataset")
    try:
        get_hf_file_metadata(url, timeout=_PATIENCE_S)
    except HfHubHTTPError:
        return None  # an answer, if not a good one: the library tells what it means
    except Exception as error:
        return _reason(error)
    return None


def _is_network(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError) or "httpx" in type(error).__module__:
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: BaseException) -> str:
    """Return what the error that began it says, on one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = " ".join(str(error).split()) or type(error).__name__
    return text.rstrip(".") if len(text) <= _LONGEST_REASON else f"{text[:_LONGEST_REASON]}..."


def read_address(table: Table, address: str) -> bytes:
    """Return a file of the hub, at most one byte more than an image may have."""
    from datasets.utils.file_utils import xopen

    with plainly(table), xopen(address, "rb") as file:
        return bytes(file.read(DEFAULT_LIMITS.max_bytes + 1))


def count_rows(files: Sequence[str]) -> int:
    """Return the rows of parquet files, from their footers alone."""
    import pyarrow.parquet

    return sum(pyarrow.parquet.read_metadata(file).num_rows for file in files)
