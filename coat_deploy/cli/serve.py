"""`coat-deploy serve`."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from coat_deploy.cli import console

if TYPE_CHECKING:
    from coat_deploy.serve.options import ListenOptions, ServeOptions

MODELS = "Models and how they compute"
WHO = "Who may come"
LIMITS = "Limits of requests"
END = "Processes and their end"


def serve(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            autocompletion=console.complete_model,
            help="Models to serve. Default: all that have an artifact.",
        ),
    ] = None,
    host: Annotated[
        str, typer.Option(metavar="ADDRESS", help="Address to listen at; 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port for HTTP; 0 takes any.")] = 8000,
    grpc_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port for gRPC; 0 leaves it out.")
    ] = 8001,
    target: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=MODELS,
            help="Default: each model's best here, as predict chooses.",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=MODELS,
            help="Default: what export --precision auto chose, or fp32.",
        ),
    ] = None,
    threads: console.ThreadsOption = None,
    device: console.DeviceOption = "cpu",
    batch: Annotated[
        int,
        typer.Option(
            min=1,
            max=1024,
            metavar="N",
            rich_help_panel=MODELS,
            help="Most images a step, where an engine computes batches at once.",
        ),
    ] = 8,
    reload: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            rich_help_panel=MODELS,
            help="How often model folders are looked at for a new version; 0 never.",
        ),
    ] = 2.0,
    allow_load: Annotated[
        bool,
        typer.Option(
            "--allow-load",
            metavar="",
            rich_help_panel=WHO,
            help="Let clients load and unload models of the repository.",
        ),
    ] = False,
    token_file: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=WHO,
            help="File with the bearer token that clients must show. Default: $COAT_TOKEN, if set.",
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=WHO, help="Certificate for TLS, PEM."),
    ] = None,
    tls_key: Annotated[
        Path | None, typer.Option(metavar="FILE", rich_help_panel=WHO, help="Its key, PEM.")
    ] = None,
    max_body: Annotated[
        int, typer.Option(min=1, metavar="MIB", rich_help_panel=LIMITS, help="Body of a request.")
    ] = 64,
    max_pixels: Annotated[
        int,
        typer.Option(
            min=1, metavar="MILLIONS", rich_help_panel=LIMITS, help="Pixels of an encoded image."
        ),
    ] = 64,
    max_batch: Annotated[
        int, typer.Option(min=1, metavar="N", rich_help_panel=LIMITS, help="Images of a request.")
    ] = 64,
    max_queue: Annotated[
        int,
        typer.Option(
            min=1,
            metavar="N",
            rich_help_panel=LIMITS,
            help="Requests of a model that may wait; more are answered 503.",
        ),
    ] = 128,
    max_queue_mib: Annotated[
        int,
        typer.Option(
            min=1, metavar="MIB", rich_help_panel=LIMITS, help="What these hold together."
        ),
    ] = 256,
    deadline: Annotated[
        float,
        typer.Option(
            min=0.001,
            metavar="SECONDS",
            rich_help_panel=LIMITS,
            help="Time for a body to come, and then for its answer.",
        ),
    ] = 30.0,
    workers: Annotated[
        int,
        typer.Option(
            min=1,
            max=256,
            metavar="N",
            rich_help_panel=END,
            help="Processes, which share the ports and divide the threads.",
        ),
    ] = 1,
    drain_delay: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            rich_help_panel=END,
            help="After SIGTERM: take requests for so long, while saying not to be ready.",
        ),
    ] = 0.0,
    drain: Annotated[
        float,
        typer.Option(
            min=1,
            metavar="SECONDS",
            rich_help_panel=END,
            help="Then: wait for so long for the answers that are owed.",
        ),
    ] = 30.0,
    access_log: Annotated[
        bool,
        typer.Option(
            "--access-log/--no-access-log",
            metavar="",
            rich_help_panel=END,
            help="A line of JSON a request, on stderr.",
        ),
    ] = True,
    models: console.ModelsOption = None,
) -> None:
    """Serve models over HTTP and gRPC, in the Open Inference Protocol (KServe v2) and for images.

    POST an image file to /models/MODEL and get its labels; clients of Triton and KServe find the
    protocol under /v2 and at --grpc-port. A model answers only after its proof was replayed on this
    machine, and is replaced without losing a request when its folder changes. Ends after SIGTERM or
    Ctrl-C when all that was asked is answered.
    """
    from coat_deploy.images import ImageLimits
    from coat_deploy.serve.auth import read_token
    from coat_deploy.serve.options import Limits, ListenOptions, ServeOptions

    mib = 1 << 20
    limits = Limits(
        body_bytes=max_body * mib,
        batch=max_batch,
        queue=max_queue,
        queue_bytes=max_queue_mib * mib,
        deadline_s=deadline,
        images=ImageLimits(max_bytes=max_body * mib, max_pixels=max_pixels * 1_000_000),
    )
    options = ServeOptions(
        models=models,
        names=tuple(names or ()),
        target=target,
        precision=precision,
        device=device,
        threads=threads,
        batch=batch,
        reload_s=reload,
        allow_load=allow_load,
        limits=limits,
    )
    listen = ListenOptions(
        host=host,
        port=port,
        grpc_port=grpc_port or None,
        token=read_token(token_file),
        certificate=tls_cert,
        key=tls_key,
        workers=workers,
        drain_delay_s=drain_delay,
        drain_s=drain,
        access_log=access_log,
    )
    run(options, listen)


def run(options: "ServeOptions", listen: "ListenOptions") -> None:
    """Serve until a signal."""
    from coat_deploy.serve import listener, processes, server
    from coat_deploy.serve.rpc.address import check_free

    # What happens to models while they are served is for whoever reads the log.
    logging.getLogger("coat_deploy.serve").setLevel(logging.INFO)
    server.check_certificate(listen)
    processes.check(options, listen)
    place = listener.bind(listen)
    if listen.host not in ("127.0.0.1", "::1", "localhost") and listen.token is None:
        console.note(f"{listen.host}: whoever reaches this address may ask; no token is set.")
    try:
        if listen.grpc_port is not None:
            check_free(listen)
        if listen.workers > 1:
            processes.serve(options, listen, place, console.note)
        else:
            server.serve(options, listen, place, console.note)
    finally:
        place.close()
