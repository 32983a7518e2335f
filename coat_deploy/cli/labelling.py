"""`coat-deploy predict --out`: labels of a whole folder, into Parquet files."""

import contextlib
import io
import logging
import time
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coat_deploy.cli import console
from coat_deploy.errors import ImageError, UsageError

if TYPE_CHECKING:
    from coat_deploy.classifier import Classifier
    from coat_deploy.labelling.folder import Summary
    from coat_deploy.labelling.part import Job, Labelled, Part

_log = logging.getLogger(__name__)

ENGINES = ("local", "ray")


@dataclass(frozen=True)
class Labelling:
    """Where labels go and what computes them; `per_file`, images a Parquet file, None as fits."""

    engine: str
    out: Path
    per_file: int | None = None
    workers: int | None = None
    address: str | None = None

    def threads(self, threads: int | None) -> int | None:
        """Return the threads of a process: of many workers, one each unless told otherwise."""
        return threads or (1 if self.engine == "ray" else None)

    def run(self, job: "Job", parts: "Sequence[Part]") -> "Generator[Labelled]":
        """Label the parts by the engine."""
        if self.engine == "local":
            from coat_deploy.labelling.local import label_here

            return label_here(job, parts)
        from coat_deploy.labelling.cluster import ClusterOptions, label_on_ray

        return label_on_ray(job, parts, ClusterOptions(self.address, self.workers))


def settle(
    engine: str,
    out: Path | None,
    per_file: int | None,
    workers: int | None,
    address: str | None,
) -> Labelling | None:
    """Return what the options ask for; None for labels in a list. Raises: UsageError."""
    from coat_deploy.errors import unknown_name

    if engine not in ENGINES:
        raise UsageError(unknown_name("engine", engine, ENGINES))
    if engine == "local" and (workers or address):
        option = "workers" if workers else "address"
        raise UsageError(f"--{option}: is for workers of Ray. Add --engine ray, or leave it out.")
    if out is None and (per_file or engine == "ray"):
        option = "per-file" if per_file else "engine ray"
        raise UsageError(f"--{option}: labels go into Parquet files. Add --out FOLDER.")
    return None if out is None else Labelling(engine, out, per_file, workers, address)


def label_folder(
    images: Sequence[Path],
    classifier: "Classifier",
    how: Labelling,
    strict: bool,
    as_json: bool,
) -> None:
    """Label the images of a folder that have no labels yet, and tell what there is then."""
    from coat_deploy.labelling.cluster import require_ray
    from coat_deploy.labelling.folder import open_job, plan_images, summarise

    if len(images) != 1 or not images[0].is_dir():
        raise UsageError("--out: takes one folder of images (got other than that). Name one.")
    if how.engine == "ray":
        require_ray()
    with open_job(images[0], how.out, classifier) as job:
        left = plan_images(job, how.per_file)
        before = summarise(job.out)
        begin = time.perf_counter()
        nodes = _label(job, left, before, how)
        seconds = time.perf_counter() - begin
        after = summarise(job.out)
    new = after.images - before.images
    figures: dict[str, Any] = {
        "out": str(how.out),
        "engine": how.engine,
        "images": after.images,
        "errors": after.errors,
        "labelled": new,
        "nodes": nodes,
        "seconds": seconds,
        "images_per_s": new / seconds if new else None,
    }
    if as_json:
        source = classifier.source
        artifact = source.artifact.name if source.artifact else None
        named = {"model": source.model.name, "artifact": artifact}
        made = {"target": source.target, "precision": source.precision, "sha256": classifier.sha256}
        console.print_json({**named, **made, **figures})
    else:
        console.emit(render(figures))
    _finish(after, strict)


def _label(job: "Job", left: "Sequence[Part]", before: "Summary", how: Labelling) -> int:
    """Label what is left; return how many nodes computed."""
    nodes: set[str] = set()
    if not left:
        return 0
    total = sum(part.images for part in left)
    if before.images:
        console.note(f"{how.out}: {before.images} images have labels, {total} are left.")
    with (
        contextlib.redirect_stdout(_Told()),
        contextlib.closing(how.run(job, left)) as labelled,
        console.progress_bar("labelling", total) as advance,
    ):
        try:
            for done in labelled:
                nodes.add(done.node)
                advance(done.images)
        except KeyboardInterrupt:
            console.note(f"{how.out}: the same command goes on where this one ends.")
            raise
    return len(nodes)


class _Told(io.TextIOBase):
    """Takes what Ray prints of lost workers, for --verbose: stdout is for results."""

    def write(self, text: str) -> int:
        """Log some lines."""
        if text.strip():
            _log.info("%s", text.strip())
        return len(text)


def render(figures: dict[str, Any]) -> str:
    """Return what there is, and what this run did, a line each."""
    lines = [f"{figures['out']}: {figures['images']} images, {figures['errors']} without labels"]
    if figures["labelled"]:
        nodes = figures["nodes"]
        where = f" on {nodes} nodes" if nodes > 1 else ""
        lines.append(
            f"{figures['labelled']} labelled now in {figures['seconds']:.1f} s, "
            f"{figures['images_per_s']:.1f} images/s{where}"
        )
    else:
        lines.append("nothing was left to do")
    return "\n".join(lines) + "\n"


def _finish(summary: "Summary", strict: bool) -> None:
    if not summary.errors:
        return
    message = f"{summary.errors} of {summary.images} images have no labels, but a reason"
    if strict:
        raise ImageError(f"{message}, and --strict is set. Remove or mend them.")
    console.note(f"{message} in the column error.")
