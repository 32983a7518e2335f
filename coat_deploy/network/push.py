"""Upload a trained model to the Hugging Face Hub.

The hub's own client does the work. Added here: asking before a long training whether an upload can
succeed; which files of a model's folder go up, in one commit; failures in one line that says how
to repeat it; silence, and an end to waiting for a server that says nothing.
"""

import contextlib
import glob
import json
import logging
import shlex
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coat_deploy.errors import BackendMissing, RepositoryError, UploadError, UsageError
from coat_deploy.model import CONFIG, WEIGHTS
from coat_deploy.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

log = logging.getLogger(__name__)

NEEDED = (CONFIG, WEIGHTS)
"""Files without which a folder is not a model."""

DESCRIBING = ("README.md", "recipe.toml", "metrics.json")
"""Files that tell how it came to be; whoever took one out of the folder wants it unpublished."""

PICTURE_SUFFIXES = (".png", ".svg")

CHECK_TIMEOUT_S = 10.0
"""Seconds without a byte after which the hub counts as gone, before a training."""

PUSH_TIMEOUT_S = 120.0
"""The same for an upload: the hub may think for a while before it answers a commit."""

LOG_IN = "Run `hf auth login`, or set HF_TOKEN"


def check_push(repository: str, endpoint: str | None = None) -> None:
    """Raise unless an upload to `repository` ("OWNER/NAME") can be expected to succeed.

    To be called before the hours of a training: changes nothing, asks the hub one question and
    does not repeat it. `endpoint` None: `$HF_ENDPOINT`, or the public hub.

    Raises: UsageError for a name that cannot be; BackendMissing without the package
        huggingface_hub; UploadError if nobody is logged in, the token cannot write to the owner's
        repositories, or the hub does not answer.
    """
    api = _client(repository, endpoint)
    with _unobtrusive(CHECK_TIMEOUT_S):
        try:
            account = api.whoami()
        # The client lets through what its HTTP library raises, and changed that library twice.
        except Exception as error:
            raise UploadError(
                f"{repository}: cannot log in to the hub {api.endpoint} ({_reason(error)}). "
                f"{_advice(error) or 'Try again later, or train without uploading.'}"
            ) from error
    _check_rights(repository, account)


def push_model(
    folder: Path, repository: str, endpoint: str | None = None, private: bool = False
) -> str:
    """Upload a trained model to `repository` ("OWNER/NAME") and return its address.

    Creates the repository where there is none: private, or else as its owner's settings say. One
    commit holds the config, the weights, the card, the recipe, the metrics and the pictures at the
    top of the folder: no checkpoints, artifacts, manifest or hidden files. The folder is only read.

    Raises: UsageError, BackendMissing as `check_push`; RepositoryError for a folder without a
        model; UploadError with the command that repeats the upload.
    """
    api = _client(repository, endpoint)
    names = _files_to_push(folder)
    with _unobtrusive(PUSH_TIMEOUT_S):
        try:
            return _commit(api, folder, names, repository, private)
        except UploadError:
            raise
        except Exception as error:
            parts = (
                f"{repository}: not uploaded ({_reason(error)}).",
                _advice(error),
                f"The model is complete in {folder}. To upload it:",
                _repeat(folder, names, repository, endpoint, private),
            )
            raise UploadError(" ".join(filter(None, parts))) from error


def _client(repository: str, endpoint: str | None) -> "HfApi":
    """Return the hub's client, for a name that it accepts."""
    try:
        from huggingface_hub import HfApi, hf_hub_url
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise BackendMissing(
            f"{repository}: package huggingface_hub is not installed. "
            'Run: pip install "coat-deploy[train]".'
        ) from error
    subject, example = f"hub repository {repository!r}", "Name it like ada/coat_lite_nano."
    if repository.count("/") != 1:
        raise UsageError(f"{subject}: not a name (expected OWNER/NAME). {example}")
    try:
        hf_hub_url(repository, CONFIG)  # validates the name, asks nothing
    except HFValidationError as error:
        raise UsageError(f"{subject}: not a name ({_line(str(error))}). {example}") from error
    # True: send the token even where the environment says that one is sent only when asked for.
    return HfApi(endpoint=endpoint, token=True)


def _check_rights(repository: str, account: Any) -> None:
    """Refuse a token that tells of itself that it cannot write to the owner's repositories.

    What the token does not tell is left to the upload to find out.
    """
    if not isinstance(account, dict):
        raise UploadError(
            f"{repository}: not the answer of a hub (got {_line(repr(account))}, expected an "
            "account). Correct HF_ENDPOINT."
        )
    token = (account.get("auth") or {}).get("accessToken")
    if not token:
        return
    name, owner = str(account.get("name")), repository.split("/")[0]
    if token.get("role") == "read":
        raise UploadError(
            f"{repository}: the token of {name} can only read. {LOG_IN}, with a token that writes."
        )
    # A token made for single owners or repositories names these instead.
    scopes = (token.get("fineGrained") or {}).get("scoped") or ()
    named = [*(account.get("orgs") or ()), *(scope.get("entity") or {} for scope in scopes)]
    owners = {name, *(str(one["name"]).split("/")[0] for one in named if one.get("name"))}
    if owner.lower() not in {one.lower() for one in owners}:
        raise UploadError(
            f"{repository}: {name} cannot write to the repositories of others (got {owner}, "
            f"expected {' or '.join(sorted(owners))}). Name another owner, or log in as somebody "
            "else with `hf auth login`."
        )


def _files_to_push(folder: Path) -> tuple[str, ...]:
    """Return the names of the files that go up, all of them at the top of the folder."""
    for name in NEEDED:
        if not (folder / name).is_file():
            raise RepositoryError(f"{folder}: no {name}, so no model to upload. Train it first.")
    pictures = sorted(
        path.name
        for path in folder.iterdir()
        if path.suffix in PICTURE_SUFFIXES and path.is_file() and not path.name.startswith(".")
    )
    describing = (name for name in DESCRIBING if (folder / name).is_file())
    return (*NEEDED, *describing, *pictures)


def _commit(
    api: "HfApi", folder: Path, names: tuple[str, ...], repository: str, private: bool
) -> str:
    """Create the repository if need be, upload the files and return the address."""
    from huggingface_hub import CommitOperationAdd

    address = api.create_repo(repository, private=private or None, exist_ok=True)
    if private and not api.model_info(repository).private:
        raise UploadError(
            f"{repository}: public already (expected private). Make it private in its settings on "
            f"the hub, or name another. The model is complete in {folder}."
        )
    # Not upload_folder: it takes what matches patterns, at any depth, in as many commits as it
    # sees fit.
    api.create_commit(
        repository,
        [CommitOperationAdd(name, folder / name) for name in names],
        commit_message=f"Upload {folder.resolve().name} with coat-deploy {__version__}",
    )
    return str(address)


@contextlib.contextmanager
def _unobtrusive(timeout_s: float) -> Iterator[None]:
    """Have the hub's client print nothing meanwhile, and wait for no byte longer than that.

    By itself it draws bars, writes of every retry to stderr, and waits for ever.
    """
    from huggingface_hub import get_session, utils
    from huggingface_hub import logging as hub_logging

    tools: Any = utils  # its functions are documented, but not marked as exported
    session, verbosity = get_session(), hub_logging.get_verbosity()
    timeout, bars = session.timeout, not tools.are_progress_bars_disabled()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        try:
            session.timeout = timeout_s
            hub_logging.set_verbosity(max(verbosity, logging.ERROR))
            if bars:
                tools.disable_progress_bars()
            yield
        finally:
            if bars:
                tools.enable_progress_bars()
            hub_logging.set_verbosity(verbosity)
            session.timeout = timeout
    for warning in caught:
        log.warning("%s", _line(str(warning.message)))


def _repeat(
    folder: Path, names: tuple[str, ...], repository: str, endpoint: str | None, private: bool
) -> str:
    """Return the command that uploads the same files to the same place."""
    words = ["hf", "upload", repository, str(folder.resolve())]
    for name in names:
        words += ["--include", glob.escape(name)]
    if private:
        words.append("--private")
    place = f"HF_ENDPOINT={shlex.quote(endpoint)} " if endpoint else ""
    return place + shlex.join(words)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an error, then the one that began it, and so on."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _advice(error: Exception) -> str:
    """Return the sentence that says what to do; empty where only the reason can tell."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    for cause in _causes(error):
        if isinstance(cause, LocalTokenNotFoundError):
            return f"{LOG_IN}."
        if isinstance(cause, HfHubHTTPError):
            status = cause.response.status_code
            if status == 401:
                return f"{LOG_IN} to a valid token; HF_TOKEN comes before the login."
            if status == 403:
                return f"{LOG_IN}, with a token that can write there."
    return ""


def _reason(error: Exception) -> str:
    """Return in one line what went wrong, in the hub's own words where it answered."""
    from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

    last: BaseException = error
    for last in _causes(error):
        if isinstance(last, LocalTokenNotFoundError):
            return "no token on this machine"
        if isinstance(last, HfHubHTTPError):
            answer = f"{last.response.status_code} {last.response.reason_phrase}"
            return _line(f"{answer}: {last.server_message}" if last.server_message else answer)
        if isinstance(last, json.JSONDecodeError):
            return "not the answer of a hub"
    return _line(str(last) or type(last).__name__)


def _line(text: str, longest: int = 200) -> str:
    """Return a text of others as a part of a sentence of ours."""
    line = " ".join(text.split())
    return (line if len(line) <= longest else line[: longest - 3] + "...").rstrip(".")
