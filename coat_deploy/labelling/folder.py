"""The folder that labels are written to: whose they are, what is planned, what is done.

    labels/
      _manifest.json            the images, the artifact and the settings: the same at every run
      _plan/0000.arrow          paths of images, a batch a part; files beyond are of later images
      part-0000-000000.parquet  the labels of a part

Names that begin with `_` or `.` are no data to readers of Parquet folders. What is done is what is
there: no other record could say otherwise.
"""

import contextlib
import fcntl
import logging
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coat_deploy.classifier import Classifier
from coat_deploy.errors import LabellingError, RepositoryError, UsageError
from coat_deploy.image_files import find_images
from coat_deploy.json_files import json_bytes, read_json
from coat_deploy.labelling.part import ASIDE, MANIFEST, PLANS, Job, Part, replace_file
from coat_deploy.labelling.plan import part_size, plan_bytes, read_plan, read_sizes
from coat_deploy.transaction import writing
from coat_deploy.version import __version__

_log = logging.getLogger(__name__)

FORMAT = 1
IDENTITY = ("images", "model", "target", "precision", "artifact", "sha256", "config", "top")
"""What of a manifest may not differ between the runs that fill a folder."""


@dataclass(frozen=True)
class Summary:
    """Rows of a folder of labels, one an image, and those of images without labels."""

    images: int
    errors: int


@contextlib.contextmanager
def open_job(images: Path, out: Path, classifier: Classifier) -> Iterator[Job]:
    """Yield the job that fills `out`, new or begun by an earlier run; nobody else fills it then.

    Raises: UsageError when `out` holds something else, or labels of something else;
    LabellingError when another process fills it; RepositoryError.
    """
    images, out = _absolute(images), _absolute(out)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with _held(out):
        manifest = _settle(out, describe(images, classifier))
        for name in os.listdir(out):
            if name.startswith(ASIDE):  # of a run that was killed
                (out / name).unlink(missing_ok=True)
        yield Job(images, out, classifier, manifest)


def describe(images: Path, classifier: Classifier) -> dict[str, Any]:
    """Return the manifest of labels to be."""
    source = classifier.source
    return {
        "format": FORMAT,
        "id": uuid.uuid4().hex,
        "version": __version__,
        "images": str(images),
        "model": source.model.name,
        "target": source.target,
        "precision": source.precision,
        "artifact": source.artifact.name if source.artifact else None,
        "sha256": classifier.sha256,
        "config": source.model.spec.digest(),
        "top": classifier.top,
    }


def plan_images(job: Job, size: int | None = None) -> list[Part]:
    """Plan the images that no plan has yet, `size` a part; return all parts without labels.

    Raises: UsageError for a folder without images, or a name that is not UTF-8; RepositoryError.
    """
    plans = _plans(job.out)
    known = {path for file in plans for path in read_plan(file)}
    found = (_relative(image, job.images) for image in find_images([job.images]))
    if new := [path for path in found if path not in known]:
        file = job.out / PLANS / f"{len(plans):04}.arrow"
        with writing(file):
            file.parent.mkdir(exist_ok=True)
        replace_file(file, plan_bytes(new, size or part_size(len(new))))
        plans.append(file)
    done = {path.name for path in _files(job.out)}
    parts = (
        Part(plan, index, images)
        for plan, file in enumerate(plans)
        for index, images in enumerate(read_sizes(file))
    )
    return [part for part in parts if part.file not in done]


def summarise(out: Path) -> Summary:
    """Count what the files of labels hold. Raises RepositoryError for one that is not whole."""
    import pyarrow.parquet as pq

    images = errors = 0
    for path in _files(out):
        try:
            footer = pq.read_metadata(path)
        except (OSError, ValueError) as error:  # pyarrow's own errors are one of these
            raise RepositoryError(
                f"{path}: not a whole Parquet file ({error}). Remove it and run again."
            ) from error
        images += footer.num_rows
        for i in range(footer.num_row_groups):
            reasons = footer.row_group(i).column(footer.num_columns - 1)
            errors += reasons.num_values - reasons.statistics.null_count
    return Summary(images, errors)


@contextlib.contextmanager
def _held(out: Path) -> Iterator[None]:
    """Hold a folder against other processes, where its file system has locks.

    Raises: LabellingError when another holds it.
    """
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise LabellingError(
                f"{out}: another process is filling it. Wait for its end, or choose another --out."
            ) from None
        except OSError as error:
            _log.debug("%s: no lock (%s)", out, error)
        yield
    finally:
        os.close(handle)


def _settle(out: Path, wanted: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the manifest in `out`, which agrees with the one wanted, or has just been put there.

    Raises: UsageError.
    """
    path = out / MANIFEST
    if not path.exists():
        if others := [name for name in os.listdir(out) if not name.startswith(ASIDE)]:
            raise UsageError(
                f"{out}: not a folder of labels (it holds {min(others)!r}). Choose another --out."
            )
        replace_file(path, json_bytes(wanted))
        return wanted
    found = read_json(path, RepositoryError)
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise UsageError(f"{path}: not a manifest of labels that is known. Choose another --out.")
    for key in IDENTITY:
        if found.get(key) != wanted[key]:
            raise UsageError(
                f"{out}: holds labels of another {key} (got {wanted[key]}, there "
                f"{found.get(key)}). Go on with the same, or choose another --out."
            )
    return found


def _plans(out: Path) -> list[Path]:
    return sorted((out / PLANS).glob("*.arrow"))


def _files(out: Path) -> list[Path]:
    return sorted(out.glob("part-*.parquet"))


def _absolute(path: Path) -> Path:
    """Return a path that holds on every node: links are left to each."""
    return Path(os.path.abspath(path))


def _relative(image: Path, folder: Path) -> str:
    name = image.relative_to(folder).as_posix()
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UsageError(
            f"{folder}: the name of a file is not UTF-8 ({os.fsencode(name)!r}). Rename it."
        ) from None
    return name
