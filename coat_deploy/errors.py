"""Every error a user can meet.

    CoatDeployError               exit status 1
    |-- UsageError                2: a name, a flag or a value that cannot be
    |-- SpecError                 a config.json that does not describe a CoaT
    |-- RepositoryError           a model folder that cannot be read or written
    |   |-- StaleArtifact         its weights or config changed after the export
    |   `-- CorruptArtifact       its bytes are not those that were exported
    |-- WeightsError              a checkpoint that does not fit
    |   `-- DownloadError         a checkpoint that could not be fetched
    |-- ImageError                a file that is not a usable image
    |-- GraphError                a graph that cannot be authored or is not valid
    |-- BackendMissing            a runtime that is not installed
    |-- RunnerError               a runtime that failed
    |   |-- PrecisionMissing      this machine does not compute in it
    |   `-- DeviceMissing         this machine has no GPU that can be used
    |-- TrainingError             a training that cannot begin or go on
    |-- LabellingError            a folder of images whose labelling cannot begin or go on
    |-- UploadError               a model that could not be published
    |-- ServerError               a server that cannot start
    |-- RequestError              a request that a server refuses; its `kind` says in what way
    `-- BelowBar                  3: an artifact that does not agree with the eager network

A message reads `<subject>: <what happened> (got X, expected Y). <what to do>.`
Our own mistakes are asserts, never one of these.
"""

import difflib
from collections.abc import Iterable
from typing import Literal


class CoatDeployError(Exception):
    """Base of all errors that are the user's to mend; `exit_status` is the command's."""

    exit_status = 1


class UsageError(CoatDeployError):
    """A name, a flag or a value that cannot be."""

    exit_status = 2


class SpecError(CoatDeployError):
    """A config.json that does not describe a CoaT."""


class RepositoryError(CoatDeployError):
    """A model folder that cannot be read or written."""


class StaleArtifact(RepositoryError):
    """An artifact whose parent, the weights or the config, changed after the export."""


class CorruptArtifact(RepositoryError):
    """An artifact whose bytes are not those that were exported."""


class WeightsError(CoatDeployError):
    """A checkpoint that does not fit the network, or cannot be read safely."""


class DownloadError(WeightsError):
    """A checkpoint that could not be fetched, or is not the one that was published."""


class ImageError(CoatDeployError):
    """A file that is not a usable image."""


class GraphError(CoatDeployError):
    """A graph that cannot be authored, traced or checked."""


class BackendMissing(CoatDeployError):
    """A runtime whose package is not installed."""


class RunnerError(CoatDeployError):
    """A runtime that failed to load or run an artifact."""


class PrecisionMissing(RunnerError):
    """A precision in which this machine does not compute."""


class DeviceMissing(RunnerError):
    """A GPU that is not there, or cannot be used."""


class TrainingError(CoatDeployError):
    """A training that cannot begin or go on."""


class LabellingError(CoatDeployError):
    """A folder of images whose labelling cannot begin or go on."""


class UploadError(CoatDeployError):
    """A model that could not be published, or will not be when its training is over."""


class ServerError(CoatDeployError):
    """A server that cannot start."""


RequestErrorKind = Literal[
    "invalid",  # malformed, or not what the model takes
    "unauthenticated",  # without the token
    "forbidden",  # switched off here
    "not_found",  # no such model, version or route
    "too_large",  # above a limit of the server
    "unsupported",  # an encoding that is not spoken
    "overloaded",  # a queue is full; later it may not be
    "unavailable",  # the model, or the whole server, is coming or going
    "slow",  # it did not come whole in time
    "deadline",  # not computed in time
    "cancelled",  # whoever asked is gone
    "internal",  # not the client's doing
]
"""How a request went wrong; each protocol has a status for it."""


class RequestError(CoatDeployError):
    """A request that a server refuses. `retry_after_s` says when another try may do better."""

    def __init__(
        self, message: str, kind: RequestErrorKind = "invalid", retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after_s = retry_after_s


class BelowBar(CoatDeployError):
    """An artifact that does not agree with the eager network."""

    exit_status = 3


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """Return the message for a `name` that is not among `known`, with the nearest one.

    >>> unknown_name("architecture", "coat_tini", ["coat_mini", "coat_tiny"])
    "unknown architecture 'coat_tini' (known: coat_mini, coat_tiny). Did you mean 'coat_tiny'?"
    """
    names = list(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
    return f"unknown {kind} '{name}' (known: {', '.join(names)}).{hint}"
