"""The InferenceService of a model, for our own server or for Triton.

Source: KServe's reference of v1beta1, and its pages on custom containers, Triton, Prometheus and
KEDA. Annotations choose plain Deployments ("RawDeployment") or Knative ("Serverless"); later
versions of KServe call them Standard and Knative, and take these names all the same.
"""

from collections.abc import Mapping
from typing import Any

from coat_deploy.artifact import Artifact
from coat_deploy.backends.select import ENGINES
from coat_deploy.errors import UsageError
from coat_deploy.kserve.options import KServeOptions, service_name
from coat_deploy.kserve.queue_time import queue_time_query
from coat_deploy.model import Model

HTTP, GRPC = 8000, 8001
TRITON_GRPC, TRITON_METRICS = 9000, 8002
MODELS, FETCHED, SCRATCH = "/models", "/mnt/models", "/tmp"
USER = 10001
DRAIN_DELAY_S, DRAIN_S = 5, 30

Fields = dict[str, Any]


def manifest(model: Model, artifact: Artifact, options: KServeOptions) -> Mapping[str, Any]:
    """Return the InferenceService that serves an artifact of a model.

    Raises: UsageError for what the server cannot do.
    """
    _check(artifact, options)
    triton = options.server == "triton"
    server = (
        _triton(artifact, options) if triton else _container_and_volumes(model, artifact, options)
    )
    metadata = {
        "name": options.name or service_name(model.name),
        **({"namespace": options.namespace} if options.namespace else {}),
        "labels": {"app.kubernetes.io/part-of": "coat-deploy"},
        "annotations": _annotations(options),
    }
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": metadata,
        "spec": {"predictor": {**_scaling(model, options), **server}},
    }


def _check(artifact: Artifact, options: KServeOptions) -> None:
    if artifact.target in ENGINES and not options.gpus:
        raise UsageError(f"{artifact.name}: an engine needs a GPU. Ask for it with --gpus 1.")
    if options.gpus and artifact.target == "openvino":
        raise UsageError(f"{artifact.name}: computes on the CPU. Leave --gpus out.")


def _annotations(options: KServeOptions) -> Mapping[str, str]:
    port = TRITON_METRICS if options.server == "triton" else HTTP
    on_knative = options.scale_on == "concurrency"
    scalers = {"queue": "keda", "nothing": "hpa"}
    return {
        "serving.kserve.io/deploymentMode": "Serverless" if on_knative else "RawDeployment",
        **({} if on_knative else {"serving.kserve.io/autoscalerClass": scalers[options.scale_on]}),
        "serving.kserve.io/enable-prometheus-scraping": "true",
        "prometheus.kserve.io/port": str(port),
        "prometheus.kserve.io/path": "/metrics",
    }


def _scaling(model: Model, options: KServeOptions) -> Fields:
    least, most = options.replicas
    replicas: Fields = {"minReplicas": least, "maxReplicas": most}
    if options.scale_on == "concurrency":
        return replicas | {"scaleMetric": "concurrency", "scaleTarget": options.concurrency}
    if options.scale_on == "nothing":
        return replicas
    metric = {
        "backend": "prometheus",
        "serverAddress": options.prometheus,
        "query": queue_time_query(options.server, model.name),
    }
    target = {"type": "Value", "value": str(options.queue_ms)}
    external = {"type": "External", "external": {"metric": metric, "target": target}}
    return replicas | {"autoScaling": {"metrics": [external]}}


def _container_and_volumes(model: Model, artifact: Artifact, options: KServeOptions) -> Fields:
    """Return the pod of our own server: nothing in it can be written but a scratch folder."""
    mounted = options.storage.startswith("pvc://")
    folder = MODELS if mounted else FETCHED
    volumes: list[Fields] = [{"name": "scratch", "emptyDir": {}}]
    mounts: list[Fields] = [{"name": "scratch", "mountPath": SCRATCH}]
    environment = {"COAT_CACHE": f"{SCRATCH}/coat-deploy"}
    if mounted:
        claim, _, path = options.storage.removeprefix("pvc://").partition("/")
        source = {"claimName": claim, "readOnly": True}
        volumes.append({"name": "models", "persistentVolumeClaim": source})
        inside = {"subPath": path.strip("/")} if path.strip("/") else {}
        mounts.append({"name": "models", "mountPath": MODELS, **inside, "readOnly": True})
    else:
        environment["STORAGE_URI"] = options.storage  # KServe fetches it to FETCHED
    return {
        "terminationGracePeriodSeconds": DRAIN_DELAY_S + DRAIN_S + 10,
        "containers": [
            {
                "name": "kserve-container",
                "image": options.image,
                "command": ["coat-deploy"],
                "args": _arguments(model, artifact, options, folder),
                "env": _env(environment),
                "ports": _ports(options),
                **_probes(options),
                "resources": _resources(options),
                "securityContext": _SECURITY,
                "volumeMounts": mounts,
            }
        ],
        "volumes": volumes,
    }


def _arguments(model: Model, artifact: Artifact, options: KServeOptions, folder: str) -> list[str]:
    words = ["serve", model.name, "--models", folder, "--host", "0.0.0.0"]
    words += ["--port", str(HTTP), "--grpc-port", str(GRPC)]
    words += ["--target", artifact.target, "--precision", artifact.precision]
    if options.gpus and artifact.target not in ENGINES:
        words += ["--device", "cuda"]
    elif not options.gpus:
        words += ["--threads", str(options.cores)]
    # The service goes on sending requests for a moment after it was told that this one ends.
    return [*words, "--drain-delay", str(DRAIN_DELAY_S), "--drain", str(DRAIN_S)]


def _ports(options: KServeOptions) -> list[Fields]:
    """Return the ports, of which the service takes the first; Knative allows no second."""
    http = {"name": "http1", "containerPort": HTTP, "protocol": "TCP"}
    grpc = {"name": "h2c", "containerPort": GRPC, "protocol": "TCP"}
    first, second = (grpc, http) if options.grpc else (http, grpc)
    return [first] if options.scale_on == "concurrency" else [first, second]


def _probes(options: KServeOptions) -> Fields:
    """Return what asks whether it lives and is ready, at the port of the service."""

    def probe(path: str) -> Fields:
        if options.grpc:
            return {"grpc": {"port": GRPC}}
        return {"httpGet": {"path": path, "port": HTTP}}

    live, ready = probe("/v2/health/live"), probe("/v2/health/ready")
    return {
        # Proofs are replayed before it is ready, however large the model and slow the disk.
        "startupProbe": {**ready, "periodSeconds": 2, "failureThreshold": 150},
        "readinessProbe": {**ready, "periodSeconds": 5, "failureThreshold": 2},
        "livenessProbe": {**live, "periodSeconds": 10, "failureThreshold": 6},
    }


def _triton(artifact: Artifact, options: KServeOptions) -> Fields:
    exact = options.gpus and artifact.target == "onnxruntime" and artifact.precision == "fp32"
    serving: Fields = {
        "modelFormat": {"name": "triton"},
        "protocolVersion": "v2",
        "storageUri": options.storage,
    }
    if options.image:
        serving["image"] = options.image
    if options.grpc:
        port = {"name": "h2c", "containerPort": TRITON_GRPC, "protocol": "TCP"}
        serving |= {"protocolVersion": "grpc-v2", "ports": [port]}
    if exact:  # a GPU may round products of fp32 to TF32
        serving["env"] = _env({"NVIDIA_TF32_OVERRIDE": "0"})
    return {"model": {**serving, "resources": _resources(options)}}


def _env(values: Mapping[str, str]) -> list[Fields]:
    return [{"name": name, "value": value} for name, value in values.items()]


def _resources(options: KServeOptions) -> Fields:
    """Return what a copy is given; memory is its limit, too, and a GPU cannot be shared."""
    gpus = {"nvidia.com/gpu": str(options.gpus)} if options.gpus else {}
    return {
        "requests": {"cpu": options.cpu, "memory": options.memory, **gpus},
        "limits": {"memory": options.memory, **gpus},
    }


_SECURITY = {
    "runAsNonRoot": True,
    "runAsUser": USER,
    "readOnlyRootFilesystem": True,
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "seccompProfile": {"type": "RuntimeDefault"},
}
