"""Everything a training needs to go on, in one file that is there whole or not at all."""

import contextlib
import errno
import os
import pickle
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coat_deploy.errors import TrainingError

FORMAT = 1
FILE = "checkpoint.pt"


@dataclass
class Position:
    """Where a training is, and what it has to remember besides tensors.

    `step` counts finished steps. `loss_sum` is of the epoch under way, in float64;
    `epoch_seconds`, `data_seconds` and `checkpoint_seconds` are for the reports. `best_top1` and
    `stale` (evaluations since) decide when to stop early.
    """

    step: int = 0
    loss_sum: float = 0.0
    epoch_seconds: float = 0.0
    data_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    seconds: float = 0.0
    best_top1: float = -1.0
    best_epoch: int = 0
    stale: int = 0


@dataclass
class Checkpoint:
    """A training at a step.

    `run` says which training it is: the fields that a resumed one must share. `network` and
    `optimiser` are their state dicts; `average` the averaged weights, `updates` the number of
    their updates; `best` the weights kept for an early stop.
    """

    run: Mapping[str, Any]
    position: Position
    network: Mapping[str, Tensor]
    optimiser: Mapping[str, Any]
    average: Mapping[str, Tensor]
    updates: int
    scaler: Mapping[str, Any] = field(default_factory=dict)
    best: Mapping[str, Tensor] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """Write the file in `folder` aside, down to the disk, then rename it into place.

        Raises: TrainingError when it cannot be written, or holds weights that are no numbers, from
            which nothing could go on; the one before is then still there.
        """
        path, aside = folder / FILE, folder / f".{FILE}"
        if not all(bool(tensor.isfinite().all()) for tensor in self.network.values()):
            raise TrainingError(
                f"{path}: not written, as the weights hold NaN or Inf; {_kept(path)}. Begin anew "
                "with a lower learning_rate, or set clip_norm."
            )
        document = {"format": FORMAT, **{k: getattr(self, k) for k in self.__dataclass_fields__}}
        document["position"] = asdict(self.position)
        document["run"] = dict(self.run)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with aside.open("wb") as file:
                torch.save(document, file)
                file.flush()
                os.fsync(file.fileno())
            os.replace(aside, path)
        # PyTorch's writer makes a RuntimeError of a full disk.
        except (OSError, RuntimeError) as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            lines = str(error).splitlines() or [type(error).__name__]
            reason = getattr(error, "strerror", None) or lines[0]
            raise TrainingError(
                f"{path}: the checkpoint cannot be written ({reason}); {_kept(path)}. "
                "Free space, then go on with --resume."
            ) from error
        return path


def _kept(path: Path) -> str:
    return "the last one is kept" if path.exists() else "there is none yet"


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the checkpoint in `folder`, None if there is none; nothing it pickles is run.

    Raises: TrainingError for a file that cannot be read, is damaged or not ours.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        document = torch.load(path, map_location="cpu", weights_only=True)
        version = document["format"]
        if version == FORMAT:
            fields = {name: document[name] for name in Checkpoint.__dataclass_fields__}
            return Checkpoint(**fields | {"position": Position(**fields["position"])})
        reason = f"is of another version (got format {version!r:.20}, expected {FORMAT})"
        cause = None
    # The loader raises what it stumbles over.
    except Exception as error:
        reason, cause = _reason(error), error
    raise TrainingError(f"{path}: {reason}. Restore it, or begin anew with --overwrite.") from cause


def _reason(error: Exception) -> str:
    """Return why a file was refused; PyTorch's own text advises to run what it pickles."""
    # PyTorch seeks before the beginning of a file that is too short.
    if isinstance(error, OSError) and error.errno != errno.EINVAL:
        return f"cannot be read ({error.strerror or error})"
    if isinstance(error, pickle.UnpicklingError):
        return "is no checkpoint: it holds more than data, or is damaged"
    return f"is damaged, cut short or no checkpoint ({type(error).__name__})"
