"""How to serve: which models, how they compute, what is refused."""

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path

from coat_deploy.errors import UsageError
from coat_deploy.images import ImageLimits

_MIB = 1 << 20


@dataclass(frozen=True)
class Limits:
    """What a request may bring, and how many may wait.

    `body_bytes`: a body, as sent and as unpacked. `json_bytes`: what of it is JSON, which takes
    long to read. `batch`: images a request. `side`: sides of a tensor's images, where the model
    takes any. `queue` and `queue_bytes`: requests of a model that wait to be computed, and their
    inputs. `receiving_bytes`: bodies of all requests that are under way. `deadline_s`: a body's
    time to come, and then the answer's. `header_bytes` and `header_s`: the head of a request.
    """

    body_bytes: int = 64 * _MIB
    json_bytes: int = 16 * _MIB
    batch: int = 64
    side: int = 1024
    queue: int = 128
    queue_bytes: int = 256 * _MIB
    receiving_bytes: int = 512 * _MIB
    deadline_s: float = 30.0
    header_bytes: int = 64 << 10
    header_s: float = 10.0
    images: ImageLimits = field(default_factory=ImageLimits)

    def __post_init__(self) -> None:
        for limit in dataclasses.fields(self):
            value = getattr(self, limit.name)
            if limit.name != "images" and value <= 0:
                raise UsageError(f"limit {limit.name}: must be above 0 (got {value}).")


@dataclass(frozen=True)
class ServeOptions:
    """Which models of which repository are served, and how.

    `names`: models to serve; none means every one that has an artifact. `target`, `precision`: of
    the artifacts; None takes each model's best. `threads` compute, and are divided among requests
    that come together. `batch`: most images a step where an engine computes batches at once.
    `warm_up`: runs of each runner before a model is ready. `reload_s`: how often model folders are
    looked at for a change; 0 never. `allow_load`: clients may load and unload models.
    """

    models: Path | None = None
    names: tuple[str, ...] = ()
    target: str | None = None
    precision: str | None = None
    device: str = "cpu"
    threads: int | None = None
    batch: int = 8
    warm_up: int = 1
    reload_s: float = 2.0
    allow_load: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class ListenOptions:
    """Where and to whom to listen.

    `grpc_port` None listens for HTTP alone. `token`: what clients have to show; None lets everyone
    in. `certificate` and `key`: PEM files, for TLS. `workers`: processes. `drain_delay_s`: how long
    a server that was asked to end goes on taking connections while it says that it is not ready;
    `drain_s`: how long it then waits for the answers that it owes.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    grpc_port: int | None = None
    token: str | None = dataclasses.field(default=None, repr=False)
    certificate: Path | None = None
    key: Path | None = None
    workers: int = 1
    drain_delay_s: float = 0.0
    drain_s: float = 30.0
    access_log: bool = True
