"""What to ask of Kubernetes for a model, and what it would refuse."""

import re
from dataclasses import dataclass

from coat_deploy.errors import UsageError, unknown_name

SERVERS = ("coat-deploy", "triton")
SCALES = ("queue", "concurrency", "nothing")
"""What the number of copies follows: time in the queue, requests at once, or the CPU's load."""

DEFAULT_PROMETHEUS = "http://prometheus-operated.monitoring.svc:9090"
MAX_NAME = 53
"""KServe adds `-predictor` to a name that may have 63 characters."""

_NAME = re.compile(r"[a-z]([a-z0-9-]*[a-z0-9])?")
_QUANTITY = re.compile(r"(\d+(\.\d+)?)(m|[KMGT]i?)?")
_STORAGE = re.compile(r"(pvc|s3|gs|hf|https?|abfss?)://[^/\s]+(/\S*)?")
_IMAGE = re.compile(r"[a-z0-9][A-Za-z0-9_./:@-]*")


@dataclass(frozen=True)
class KServeOptions:
    """How a model is to be served on Kubernetes.

    `storage`: where its files are; of our server the folder that holds the model's folder, of
    Triton a repository as written by `coat-deploy triton`. "pvc://CLAIM/PATH" is mounted, any
    other URI fetched by KServe. `name` None is made of the model's. `image` is Triton's to choose
    if None. `replicas`: least and most. `scale_on`: one of `SCALES`. `queue_ms` in the queue or
    `concurrency` requests at once are what a copy is meant to have. `prometheus` answers for
    the time in the queue. `grpc`: lead gRPC to the service, not HTTP.
    """

    storage: str
    server: str = "coat-deploy"
    image: str | None = None
    name: str | None = None
    namespace: str | None = None
    cpu: str = "2"
    memory: str = "2Gi"
    gpus: int = 0
    replicas: tuple[int, int] = (1, 4)
    scale_on: str = "queue"
    queue_ms: int = 20
    concurrency: int = 8
    prometheus: str = DEFAULT_PROMETHEUS
    grpc: bool = False

    def __post_init__(self) -> None:
        for what, value, known in (
            ("server", self.server, SERVERS),
            ("scale", self.scale_on, SCALES),
        ):
            if value not in known:
                raise UsageError(unknown_name(what, value, known))
        for field, least in (("gpus", 0), ("queue_ms", 1), ("concurrency", 1)):
            if not least <= getattr(self, field) <= 1_000_000:
                raise UsageError(
                    f"{field.replace('_', '-')}: must be {least} or more (got "
                    f"{getattr(self, field)})."
                )
        least_replicas, most = self.replicas
        if not 0 <= least_replicas <= most or most < 1:
            raise UsageError(
                f"replicas: cannot be (got {least_replicas},{most}, expected least,most)."
            )
        if least_replicas == 0 and self.scale_on != "concurrency":
            raise UsageError(
                "replicas: none at all is for --scale-on concurrency, which holds requests until "
                "there is one. Take it, or at least 1."
            )
        self._check_texts()

    def _check_texts(self) -> None:
        texts = {
            "storage": (
                self.storage,
                _STORAGE,
                "pvc://CLAIM/PATH, s3://, gs://, hf:// or https://",
            ),
            "cpu": (self.cpu, _QUANTITY, "cores as 2 or 500m"),
            "memory": (self.memory, _QUANTITY, "bytes as 2Gi or 512Mi"),
            "image": (self.image or "any", _IMAGE, "a container image"),
            "namespace": (self.namespace or "any", _NAME, _NAME_RULE),
            "as": (self.name or "any", _NAME, _NAME_RULE),
        }
        for option, (value, pattern, expected) in texts.items():
            if not pattern.fullmatch(value):
                raise UsageError(f"--{option}: cannot be (got {value!r}, expected {expected}).")
        if self.name == "" or len(self.name or "") > MAX_NAME:
            raise UsageError(f"--as: must have 1 to {MAX_NAME} characters (got {self.name!r}).")
        if self.server == "coat-deploy" and not self.image:
            raise UsageError("--image: is needed. Give the image that you built of our Dockerfile.")

    @property
    def cores(self) -> int:
        """Cores that a copy may count on, at least one."""
        found = _QUANTITY.fullmatch(self.cpu)
        assert found
        return max(1, int(float(found[1]) / (1000 if found[3] == "m" else 1)))


_NAME_RULE = "small letters, digits and '-', the first a letter"


def service_name(model: str) -> str:
    """Return a name for Kubernetes made of a model's. Raises UsageError where there is none."""
    name = re.sub(r"[^a-z0-9]+", "-", model.lower()).strip("-")
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME:
        raise UsageError(
            f"model '{model}': no name for Kubernetes can be made of it (expected {_NAME_RULE}, "
            f"up to {MAX_NAME}). Give one with --as."
        )
    return name
