"""`coat-deploy selftest`."""

from typing import Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.errors import BelowBar, CoatDeployError, RepositoryError


def selftest(
    model: console.ModelArgument,
    target: Annotated[
        str | None, typer.Option(help="Only artifacts of this target. Default: all.")
    ] = None,
    threads: console.ThreadsOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Replay the proofs of a model's artifacts on this machine; exit status 3 if one fails.

    Needs neither PyTorch nor photographs: a few inputs and what PyTorch made of them lie beside
    every artifact.
    """
    from coat_deploy.backends.select import TARGETS, backend
    from coat_deploy.errors import UsageError, unknown_name
    from coat_deploy.open import Source, open_source
    from coat_deploy.open import selftest as replay
    from coat_deploy.repository import Repository
    from coat_deploy.runner import LoadOptions

    if target is not None and target not in TARGETS:
        raise UsageError(unknown_name("target", target, TARGETS))
    opened = Repository.open(models).find(model)
    artifacts = [a for a in opened.artifacts if target in (None, a.target)]
    if not artifacts:
        raise RepositoryError(
            f"{opened.folder}: no artifact to test. Run: coat-deploy export {model} "
            f"--models {opened.folder.parent}"
        )
    results: list[dict[str, Any]] = []
    for artifact in artifacts:
        entry: dict[str, Any] = {"artifact": artifact.name, "passed": False, "error": None}
        command = backend(artifact.target).missing()
        if target is None and command:
            results.append(entry | {"passed": None, "error": f"skipped; needs {command}"})
            continue
        try:
            source = Source(opened, artifact.target, artifact)
            with open_source(source, LoadOptions(threads=threads)) as runner:
                agreement = replay(opened, artifact, runner)
            entry |= {"passed": True, "max_abs_difference": agreement.max_abs_difference}
        except CoatDeployError as error:
            entry["error"] = str(error)
        results.append(entry)
    failed = [result for result in results if result["passed"] is False]
    if as_json:
        console.print_json({"model": opened.name, "passed": not failed, "artifacts": results})
    else:
        columns = ("artifact", "passed", "max |delta|", "")
        rows = [
            (r["artifact"], r["passed"], r.get("max_abs_difference"), r["error"] or "")
            for r in results
        ]
        console.print_table(columns, rows)
    if failed:
        names = ", ".join(result["artifact"] for result in failed)
        raise BelowBar(f"{opened.name}: {names} failed the self-test.")
