"""`coat-deploy kserve`."""

from typing import TYPE_CHECKING, Annotated

import typer

from coat_deploy.cli import console
from coat_deploy.errors import UsageError

if TYPE_CHECKING:
    from coat_deploy.artifact import Artifact
    from coat_deploy.model import Model

SCALING = "How many copies"


def kserve(
    model: console.ModelArgument,
    storage: Annotated[
        str,
        typer.Option(
            metavar="URI",
            show_default=False,
            help="Where the files are: pvc://CLAIM/PATH, s3://, gs://, hf:// or https://. The "
            "folder that holds MODEL, or for Triton a repository of coat-deploy triton.",
        ),
    ],
    image: Annotated[
        str | None,
        typer.Option(
            metavar="IMAGE", help="Container image of the server. Default for Triton: KServe's."
        ),
    ] = None,
    server: Annotated[
        str, typer.Option(metavar="NAME", help="coat-deploy, or triton.")
    ] = "coat-deploy",
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Default: the first that MODEL has logits for."),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="Precision of the artifact.")
    ] = None,
    rename: Annotated[
        str | None,
        typer.Option("--as", metavar="NAME", help="Name on Kubernetes. Default: made of MODEL."),
    ] = None,
    namespace: Annotated[
        str | None, typer.Option(metavar="NAME", help="Default: that of who applies it.")
    ] = None,
    cpu: Annotated[str, typer.Option(metavar="N", help="Cores of a copy.")] = "2",
    memory: Annotated[
        str, typer.Option(metavar="BYTES", help="Memory of a copy, at most.")
    ] = "2Gi",
    gpus: Annotated[int, typer.Option(metavar="N", help="NVIDIA GPUs of a copy.")] = 0,
    grpc: Annotated[
        bool, typer.Option("--grpc", metavar="", help="Lead gRPC to the service, not HTTP.")
    ] = False,
    replicas: Annotated[
        str,
        typer.Option(metavar="N,N", rich_help_panel=SCALING, help="Least and most copies."),
    ] = "1,4",
    scale_on: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            rich_help_panel=SCALING,
            help="queue: time in the queue, by KEDA and Prometheus. concurrency: requests at once, "
            "by Knative. nothing: the CPU's load.",
        ),
    ] = "queue",
    queue_ms: Annotated[
        int,
        typer.Option(metavar="N", rich_help_panel=SCALING, help="Milliseconds in the queue."),
    ] = 20,
    concurrency: Annotated[
        int, typer.Option(metavar="N", rich_help_panel=SCALING, help="Requests at once a copy.")
    ] = 8,
    prometheus: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            rich_help_panel=SCALING,
            help="Default: that of Prometheus' operator in the namespace monitoring.",
        ),
    ] = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Print a manifest that serves a model on Kubernetes, by KServe.

    An InferenceService of our own server, or of NVIDIA's Triton: ports, probes, resources, files
    mounted or fetched, a container that is not root and can write nothing but a scratch folder,
    metrics for Prometheus, and as many copies as the time in the queue asks for.

    What --storage points to has to be put there by you: the folder --models, or --out of
    coat-deploy triton. Feed the output to kubectl apply -f -.
    """
    from coat_deploy.kserve.manifest import manifest
    from coat_deploy.kserve.options import DEFAULT_PROMETHEUS, KServeOptions
    from coat_deploy.kserve.yaml_text import render
    from coat_deploy.repository import Repository

    options = KServeOptions(
        storage=storage,
        server=server,
        image=image,
        name=rename,
        namespace=namespace,
        cpu=cpu,
        memory=memory,
        gpus=gpus,
        replicas=_replicas(replicas),
        scale_on=scale_on,
        queue_ms=queue_ms,
        concurrency=concurrency,
        prometheus=prometheus or DEFAULT_PROMETHEUS,
        grpc=grpc,
    )
    opened = Repository.open(models).find(model)
    document = manifest(opened, _artifact(opened, server, target, precision), options)
    if as_json:
        console.print_json(document)
    else:
        console.emit(render(document))


def _artifact(model: "Model", server: str, target: str | None, precision: str | None) -> "Artifact":
    """Return the artifact to serve; another machine runs it. Raises UsageError, RepositoryError."""
    from coat_deploy.backends.select import CHOSEN, check_served
    from coat_deploy.model import ArtifactQuery
    from coat_deploy.open import find_source

    with_logits = [artifact for artifact in model.artifacts if not artifact.features]
    # Triton serves feature maps as well, our server does not.
    features = server == "triton" and bool(model.artifacts) and not with_logits
    there = {artifact.target for artifact in (model.artifacts if features else with_logits)}
    target = target or next((name for name in CHOSEN if name in there), "onnxruntime")
    check_served(target)
    query = ArtifactQuery(target, precision, features=features)
    artifact = find_source(model, query).artifact
    assert artifact is not None
    return artifact


def _replicas(text: str) -> tuple[int, int]:
    """Read "1,4", or "2" for always two. Raises UsageError."""
    parts = console.comma_separated(text, "replicas")
    if len(parts) > 2 or not all(p.isascii() and p.isdigit() and len(p) < 6 for p in parts):
        raise UsageError(f"--replicas: must be least,most, or one number (got {text!r}).")
    return int(parts[0]), int(parts[-1])
