"""Label a folder with Ray Data: on all cores of this machine, or on a cluster.

    parts > actors, each with a classifier of its own > a row a part that was labelled

Only numbers of parts travel through Ray: workers read the images, and write the labels, where all
nodes see them.
"""

import contextlib
import importlib.util
import logging
import os
import signal
import socket
import threading
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from coat_deploy import errors
from coat_deploy.backends.select import for_gpu
from coat_deploy.errors import CoatDeployError, LabellingError, UsageError
from coat_deploy.labelling.part import ASIDE, Job, Labelled, Part, label_part
from coat_deploy.labelling.plan import read_part
from coat_deploy.machine import usable_threads
from coat_deploy.transaction import writing

_log = logging.getLogger(__name__)

LOCAL = "local"
MOST_BLOCKS = 4096
"""Blocks that Ray Data is given: each takes it milliseconds, so that they hold several parts."""
TRIES = 4
"""How many workers may die of a part: Ray would give it to another for ever."""
CONNECT_S = 10.0
"""How long the head of a cluster may take to answer."""
OBJECT_STORE_BYTES = 128 << 20
"""Memory of a local Ray for what travels between processes; here next to nothing does."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_AUTH_MODE": "token",  # as Ray itself decides for a local start, but without a word
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}
"""What Ray reads when it is imported or started; what the user set stays."""


@dataclass(frozen=True)
class ClusterOptions:
    """Where Ray runs, and how much of it is used.

    `address` of one that runs, of which this machine is a node, or "auto"; None is $RAY_ADDRESS,
    and without it one is started here.
    `workers`: None is as many as there is room for, each of the threads of its classifier's `load`.
    """

    address: str | None = None
    workers: int | None = None


def require_ray() -> None:
    """Raise LabellingError with the command that installs Ray, where it is missing."""
    if importlib.util.find_spec("ray") is None:
        raise LabellingError(
            "engine ray: its package is not installed. "
            'Run: pip install "coat-deploy[ray]", on every node.'
        )


def label_on_ray(job: Job, parts: Sequence[Part], options: ClusterOptions) -> Generator[Labelled]:
    """Label the parts in any order, each told when it is done.

    Raises: LabellingError when Ray cannot be reached or fails; UsageError for more workers than
    there is room for; what any worker met, as `label_part`.
    """
    with _session(options.address or os.environ.get("RAY_ADDRESS")):
        import ray
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        ray.data.DataContext.get_current().enable_progress_bars = False
        workers = _workers(ray.cluster_resources(), job, options)
        rows = [asdict(part) for part in parts]
        data = ray.data.from_items(rows, override_num_blocks=min(len(rows), MOST_BLOCKS))
        done = data.map_batches(
            _worker(job),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(workers, len(rows))),
            num_cpus=_cpus(job),
            num_gpus=_gpus(job) or None,
        )
        try:
            for row in done.iter_rows():
                if row["failure"]:
                    raise getattr(errors, row["failure"])(row["message"])
                yield Labelled(row["images"], row["errors"], row["node"])
        except ray.exceptions.RayError as error:
            raise LabellingError(f"Ray: failed ({_reason(error)}). Run again to go on.") from error


def _worker(job: Job) -> type:
    """Return the class of Ray Data's actors: an instance opens the artifact once for many parts."""

    class Worker:
        def __init__(self) -> None:
            self._checked = False

        def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[Any]]:
            import ray

            row: dict[str, Any] = asdict(Labelled(0, 0))
            row |= {"node": ray.get_runtime_context().get_node_id(), "failure": "", "message": ""}
            try:
                if not self._checked:
                    job.check()
                    self._checked = True
                part = Part(**{key: int(value) for key, (value,) in batch.items()})
                with trying(job, part):
                    labelled = label_part(job, part)
                row |= {"images": labelled.images, "errors": labelled.errors}
            except CoatDeployError as error:  # as a value: Ray would wrap it in pages of its own
                row |= {"failure": type(error).__name__, "message": str(error)}
            except Exception as error:
                _log.exception("a part failed")  # in the worker's log, which Ray keeps
                what = f"a worker on {os.uname().nodename} failed ({type(error).__name__}: {error})"
                row |= {"failure": LabellingError.__name__, "message": f"{what}. Run again."}
            return {key: [value] for key, value in row.items()}

    return Worker


@contextlib.contextmanager
def trying(job: Job, part: Part) -> Iterator[None]:
    """Note beside the labels that a part is tried, as long as the body takes.

    Raises: LabellingError when that stands there already, of as many workers as may die of one.
    """
    tried = job.out / f"{ASIDE}{part.file}"
    with writing(tried), tried.open("ab") as file:
        file.write(b"x")
        tries = file.tell()
    if tries > TRIES:
        names = read_part(job.out / part.plan_file, part.index)
        raise LabellingError(
            f"{part.file}: {TRIES} workers died of it, of too little memory or of an image that "
            f"crashes them ({names[0]} to {names[-1]}). Ask for fewer --workers or a smaller "
            "--batch, or move the image away, and run again."
        )
    yield
    tried.unlink(missing_ok=True)


def _cpus(job: Job) -> int:
    return job.classifier.load.threads or 1


def _gpus(job: Job) -> int:
    source, device = job.classifier.source, job.classifier.load.device
    return int(device == "cuda" or for_gpu(source.target, source.precision))


def _workers(resources: Mapping[str, float], job: Job, options: ClusterOptions) -> int:
    """Return how many workers there are to be. Raises UsageError when there is no room for them."""
    room = int(resources.get("CPU", 0) // _cpus(job))
    each = f"{_cpus(job)} CPUs"
    if _gpus(job):
        room, each = min(room, int(resources.get("GPU", 0))), f"{each} and a GPU"
    wanted = options.workers or max(room, 1)
    if wanted > room:
        raise UsageError(
            f"workers: more than Ray has room for (got {wanted} of {each} each, expected {room} at "
            "most). Ask for fewer, or of fewer --threads."
        )
    return wanted


@contextlib.contextmanager
def _session(address: str | None) -> Iterator[None]:
    """Be connected to Ray, or to one that lives as long as the body.

    Raises: LabellingError.
    """
    if address:
        _check_address(address)
    for name, value in _ENVIRONMENT.items():
        if address is None or name != "RAY_AUTH_MODE":
            os.environ.setdefault(name, value)
    import ray

    if ray.is_initialized():
        yield
        return
    start: dict[str, Any] = {"address": address or LOCAL}
    if address is None:
        start |= {"num_cpus": usable_threads(), "include_dashboard": False}
        start |= {"object_store_memory": OBJECT_STORE_BYTES}
    try:
        with _starting():
            ray.init(**start, log_to_driver=False, logging_level=logging.CRITICAL)
    except (ray.exceptions.RayError, OSError, RuntimeError, ValueError) as error:
        where = f"at {address}: cannot be reached" if address else "cannot be started"
        raise LabellingError(f"Ray {where} ({_reason(error)}).") from error
    try:
        yield
    finally:
        ray.shutdown()


def _check_address(address: str) -> None:
    """Raise for an address where nobody answers: Ray itself would try for minutes."""
    if address in (LOCAL, "auto"):
        return
    host, _, port = address.rpartition(":")
    if "/" in address or not host or not port.isdigit():
        raise UsageError(
            f"address {address!r}: not one of a Ray cluster (expected HOST:PORT, or auto). Clients "
            "(ray://) cannot see its files: run the command on one of its nodes."
        )
    try:
        socket.create_connection((host, int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise LabellingError(
            f"Ray at {address}: cannot be reached ({error}). Check that it runs: ray status."
        ) from error


@contextlib.contextmanager
def _starting() -> Iterator[None]:
    """Undo that Ray takes SIGTERM for its own, and keep from stderr that it reads a variable."""
    here = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGTERM)
    stderr, nothing = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nothing, 2)  # libraries in C++ know the number alone
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nothing)
        if here:
            signal.signal(signal.SIGTERM, before)


def _reason(error: BaseException) -> str:
    """Return the last line of an error of Ray's, which says most."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[-1] if lines else type(error).__name__).rstrip(".")
