"""A part of a folder: images that are labelled as one, and the Parquet file they become.

The file is written aside and renamed into place, so it is there whole or not at all, and it is the
only record that its images are done. A part always has the same images and the same name: whoever
labels it twice, be it a worker that outlived its driver, puts the same rows in the same place.
"""

import contextlib
import json
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coat_deploy.classifier import Answer, Classifier, NamedImage
from coat_deploy.errors import LabellingError, RepositoryError
from coat_deploy.json_files import read_json
from coat_deploy.labelling.plan import read_part
from coat_deploy.transaction import write_file, writing
from coat_deploy.version import __version__

MANIFEST, PLANS = "_manifest.json", "_plan"
ASIDE = ".aside-"
METADATA = b"coat-deploy"
"""Key of the Parquet files' metadata that holds the manifest."""


@dataclass(frozen=True)
class Part:
    """Some images, `index` of a plan, which are so many."""

    plan: int
    index: int
    images: int

    @property
    def file(self) -> str:
        """Name of the Parquet file."""
        return f"part-{self.plan:04}-{self.index:06}.parquet"

    @property
    def plan_file(self) -> str:
        """Name of the plan's file, below the folder of labels."""
        return f"{PLANS}/{self.plan:04}.arrow"


@dataclass(frozen=True)
class Job:
    """What every part has in common; it can be pickled, and all paths are absolute."""

    images: Path
    out: Path
    classifier: Classifier
    manifest: Mapping[str, Any]
    version: str = __version__

    def check(self) -> None:
        """Check that this machine sees the same folders, through the same coat-deploy.

        Raises: LabellingError.
        """
        here = os.uname().nodename
        if self.version != __version__:
            raise LabellingError(
                f"coat-deploy on {here}: of another version (got {__version__}, expected "
                f"{self.version}). Install the same on every node."
            )
        folder = self.classifier.source.model.folder
        if not os.path.isdir(folder):
            raise _not_shared(folder, "no such model folder")
        check_images(self.images)
        try:
            found = read_json(self.out / MANIFEST, RepositoryError)
        except RepositoryError as error:
            raise _not_shared(self.out, "not the folder of these labels") from error
        if not isinstance(found, dict) or found.get("id") != self.manifest["id"]:
            raise _not_shared(self.out, "not the folder of these labels")


@dataclass(frozen=True)
class Labelled:
    """What came of a part: its images, those of them without labels, and where it was computed."""

    images: int
    errors: int
    node: str = ""


def label_part(job: Job, part: Part) -> Labelled:
    """Label the images of a part and put its file into the folder of labels.

    Raises: LabellingError when the images' folder is gone; RepositoryError for what cannot be
    read or written; as `Classifier.__call__`.
    """
    names = read_part(job.out / part.plan_file, part.index)
    answers = job.classifier([NamedImage(name, job.images / name) for name in names])
    errors = sum(not isinstance(answer, list) for answer in answers)
    if errors:  # of images that are gone with their whole folder nothing is to be recorded
        check_images(job.images)
    replace_file(job.out / part.file, _parquet(names, answers, job.manifest))
    return Labelled(len(names), errors)


def check_images(folder: Path) -> None:
    """Raise LabellingError when the folder of images is not there, or is an empty mount point."""
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        if any(True for _ in entries):
            return
    raise _not_shared(folder, "no such folder of images, or an empty one")


def replace_file(path: Path, content: bytes) -> None:
    """Write a file aside and rename it into place. Raises RepositoryError."""
    aside = path.with_name(f"{ASIDE}{uuid.uuid4().hex}")
    try:
        write_file(aside, content)
        with writing(path):
            os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _not_shared(folder: Path, what: str) -> LabellingError:
    return LabellingError(
        f"{folder}: {what} on {os.uname().nodename}. All nodes must see the same files under this "
        "path: mount it there."
    )


def _parquet(names: Sequence[str], answers: Sequence[Answer], manifest: Mapping[str, Any]) -> bytes:
    """Return a Parquet file with a row an image, the best label first; without, the reason."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = [answer if isinstance(answer, list) else None for answer in answers]
    reasons = [None if isinstance(answer, list) else str(answer) for answer in answers]
    labels = [None if row is None else [one["label"] for one in row] for row in found]
    scores = [None if row is None else [one["score"] for one in row] for row in found]
    table = pa.table(
        {
            "path": pa.array(names, pa.string()),
            "labels": pa.array(labels, pa.list_(pa.string())),
            "scores": pa.array(scores, pa.list_(pa.float64())),
            "error": pa.array(reasons, pa.string()),  # the last: errors are counted by that
        },
        metadata={METADATA: json.dumps(manifest).encode()},
    )
    content = pa.BufferOutputStream()
    pq.write_table(table, content)
    return bytes(content.getvalue().to_pybytes())
