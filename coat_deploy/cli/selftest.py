"""`coat-deploy selftest`."""

import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from coat_deploy.cli import console
from coat_deploy.errors import (
    BackendMissing,
    BelowBar,
    CoatDeployError,
    RepositoryError,
    SpecError,
    UsageError,
    unknown_name,
)

if TYPE_CHECKING:
    from coat_deploy.artifact import Artifact
    from coat_deploy.model import Model
    from coat_deploy.runner import LoadOptions


def selftest(
    model: console.ModelArgument,
    target: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Only artifacts of this target. Default: all."),
    ] = None,
    threads: console.ThreadsOption = None,
    device: console.DeviceOption = "cpu",
    provider: console.ProviderOption = None,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Check on this machine that artifacts still compute what PyTorch did.

    Replays the proof that lies beside every artifact: a few inputs and what PyTorch made of them.
    Needs neither PyTorch nor photographs. Exit status 3 if an artifact does not reproduce its
    proof, or is no longer the file that was exported.
    """
    from coat_deploy.backends.select import TARGETS
    from coat_deploy.model import ArtifactQuery
    from coat_deploy.open import EAGER
    from coat_deploy.repository import Repository
    from coat_deploy.runner import LoadOptions

    load = LoadOptions(threads=threads, device=device, provider=provider)
    known = [name for name in TARGETS if name != EAGER]
    if target is not None and target not in known:
        raise UsageError(unknown_name("target", target, known))
    opened = Repository.open(models).find(model)
    artifacts = [a for a in opened.artifacts if target in (None, a.target)]
    if not artifacts:
        of = f" of {target}" if target else ""
        command = opened.export_command(ArtifactQuery(target or known[0]))
        raise RepositoryError(f"{opened.folder}: no artifact{of} to test. Run: {command}")
    with console.steps(f"testing {opened.name}") as tell:
        results = []
        for artifact in artifacts:
            tell(artifact.name)
            results.append(test(opened, artifact, load))
    failed = [result for result in results if result["passed"] is False]
    tested = [result for result in results if result["passed"] is not None]
    passed = bool(tested) and not failed
    if as_json:
        console.print_json({"model": opened.name, "passed": passed, "artifacts": results})
    else:
        verdicts = {True: "passed", False: "FAILED", None: "skipped"}
        columns = ("artifact", "", "max |delta|", "seconds")
        rows = [
            (r["artifact"], verdicts[r["passed"]], r["max_abs_difference"], r["seconds"])
            for r in results
        ]
        console.print_table(columns, rows)
        for result in results:
            if result["error"]:
                console.emit(f"\n{result['artifact']}: {result['error']}\n")
    if failed:
        names = ", ".join(result["artifact"] for result in failed)
        raise BelowBar(f"{opened.name}: failed the self-test: {names}.")
    if not tested:
        raise BackendMissing(f"{opened.name}: nothing was tested. {results[0]['error']}.")


def test(model: "Model", artifact: "Artifact", options: "LoadOptions") -> dict[str, Any]:
    """Replay an artifact's proof; return how that went, `passed` None if it could not be tried."""
    from coat_deploy.backends.select import unusable
    from coat_deploy.open import Source, check_machine
    from coat_deploy.open import selftest as replay

    result: dict[str, Any] = {
        "artifact": artifact.name,
        "passed": None,
        "max_abs_difference": None,
        "seconds": None,
        "error": None,
    }
    reason = unusable(artifact.target, artifact.precision, options.device)
    if reason:
        return result | {"error": reason}
    start = time.perf_counter()
    try:
        model.check_parents(artifact)
        model.check_files(artifact)
        check_machine(model, artifact, options.device)
        with Source(model, artifact.target, artifact).loader(options)() as runner:
            agreement = replay(model, artifact, runner)
    except SpecError:
        raise  # it is the model's, not the artifact's
    except CoatDeployError as error:
        return result | {"passed": False, "error": str(error)}
    seconds = round(time.perf_counter() - start, 3)
    difference = agreement.max_abs_difference
    return result | {"passed": True, "max_abs_difference": difference, "seconds": seconds}
