"""`coat-deploy models`: what the repository holds."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from coat_deploy.cli import console
from coat_deploy.errors import CoatDeployError, CorruptArtifact, RepositoryError, StaleArtifact
from coat_deploy.spec import ModelSpec, format_size

if TYPE_CHECKING:
    from coat_deploy.artifact import Artifact
    from coat_deploy.model import Model

PUBLISHED_CLASSES = 1000
NUM_LABELS_SHOWN = 5

models = typer.Typer(
    help="List the models of the repository, or show one.\n\n"
    "Models are sought in --models DIR, $COAT_MODELS, ./models and the published configs; of one "
    "name the first counts. Without a command the models are listed.",
    invoke_without_command=True,
)


@models.callback()
@console.guarded
def models_options(
    context: typer.Context,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """List the models when no command is given."""
    if context.invoked_subcommand is None:
        list_models(context, models, as_json)


@models.command("list")
@console.guarded
def list_models(
    context: typer.Context,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """List every model: sizes, published accuracy, weights and artifacts.

    GMACs are for one image of the model's own size. top-1 and top-5 are per
    cent on ImageNet-1k as timm measured the published weights; a dash for a
    model with other weights, classes or size.

    A model that cannot be read is listed with the reason.
    """
    from coat_deploy.repository import Repository

    models, as_json = _with_options_of_group(context, models, as_json)
    found = [summarise(model) for model in Repository.open(models).models()]
    if as_json:
        console.print_json({"models": found})
        return
    console.print_table(
        ("model", "architecture", "params (M)", "GMACs", "top-1", "top-5", "size", "classes")
        + ("weights", "artifacts"),
        [_row(entry) for entry in found],
    )
    for entry in found:
        if entry["error"]:
            print(f"\n{entry['name']}: {entry['error']}")


@models.command("show")
@console.guarded
def show_model(
    context: typer.Context,
    model: console.ModelArgument,
    models: console.ModelsOption = None,
    as_json: console.JsonOption = False,
) -> None:
    """Show all there is to know about a model.

    Its spec and preprocessing, labels, published figures, where its weights
    came from, and every artifact with its state: ok; stale (the weights or
    the config changed since); corrupt (its bytes are not those exported);
    missing (a file is gone). Every byte is read for that.
    """
    from coat_deploy.repository import Repository

    models, as_json = _with_options_of_group(context, models, as_json)
    try:
        described = describe(Repository.open(models).find(model))
    except OSError as error:
        raise RepositoryError(f"{model}: a file cannot be read ({error}).") from error
    if as_json:
        console.print_json(described)
    else:
        _print(described)


def _with_options_of_group(context: typer.Context, models: Any, as_json: bool) -> tuple[Any, bool]:
    """Return the options, from before the command ("models --json list") where not after it."""
    group = context.parent.params if context.parent else {}
    return models or group.get("models"), as_json or bool(group.get("as_json"))


def summarise(model: "Model") -> dict[str, Any]:
    """Return a line of the list; of a model that cannot be read, little but the `error`."""
    entry: dict[str, Any] = {"name": model.name, "folder": str(model.folder.resolve())}
    keys = ("architecture", "params_m", "gmacs", "top1", "top5", "input_size", "classes")
    entry |= dict.fromkeys(keys)
    entry |= {"weights": model.weights_path.exists(), "artifacts": [], "error": None}
    try:
        spec = model.spec
        entry |= {"architecture": spec.architecture, "classes": spec.num_classes}
        entry["input_size"] = list(spec.preprocess.input_size)
        entry |= _figures(model, spec)
        entry["artifacts"] = [artifact.name for artifact in model.artifacts]
    except CoatDeployError as error:
        entry["error"] = str(error)
    return entry


def _figures(model: "Model", spec: ModelSpec) -> dict[str, float | None]:
    """Return those figures of the architecture that hold for this very model."""
    from coat_deploy.network.variants import get_variant

    figures: dict[str, float | None] = dict.fromkeys(("params_m", "gmacs", "top1", "top5"))
    variant = get_variant(spec.architecture)
    published = variant.published
    size = (published.params_m, published.gmacs) if published else variant.counted
    if size is None or spec.model_args:
        return figures
    # The classifier is the one part that differs: a row of weights and a bias for every class.
    head_m = (spec.num_classes - PUBLISHED_CLASSES) * (variant.num_features + 1) / 1e6
    figures["params_m"] = round(size[0] + head_m, 2)
    if spec.preprocess.input_size != (variant.input_size, variant.input_size):
        return figures
    figures["gmacs"] = size[1]
    if published is None:
        return figures
    # Weights put there by hand are of unknown origin, whatever the config points to.
    present = model.weights_path.exists()
    record = model.weights_record if present else spec.weights
    digest = (record and record.sha256) or ""
    source = record.source if record else ("unknown" if present else "official")
    as_published = source in ("timm", "official") or digest.startswith(published.sha8)
    if as_published and spec.num_classes == PUBLISHED_CLASSES:
        figures |= {"top1": published.top1, "top5": published.top5}
    return figures


def describe(model: "Model") -> dict[str, Any]:
    """Return everything about a model. Raises SpecError, RepositoryError."""
    from dataclasses import asdict

    from coat_deploy.digest import sha256_file
    from coat_deploy.network.variants import get_variant
    from coat_deploy.repository import read_labels

    spec, entry = model.spec, summarise(model)
    if entry["error"]:
        raise RepositoryError(entry["error"])
    published = get_variant(spec.architecture).published
    path = model.weights_path
    record = model.weights_record if path.exists() else spec.weights
    named = "label_names" if spec.label_names else spec.label_set
    return entry | {
        "num_features": spec.num_features,
        "model_args": dict(spec.model_args),
        "preprocess": asdict(spec.preprocess),
        "labels": {
            "count": spec.num_classes,
            "from": named,
            "first": list(read_labels(spec)[:NUM_LABELS_SHOWN]),
        },
        "published": asdict(published) | {"url": published.url} if published else None,
        "weights": {
            "present": path.exists(),
            "path": str(path.resolve()),
            "bytes": path.stat().st_size if path.exists() else None,
            "sha256": sha256_file(path) if path.exists() else None,
            "record": record.to_json() if record else None,
        },
        "artifacts": [_describe_artifact(model, artifact) for artifact in model.artifacts],
    }


def _describe_artifact(model: "Model", artifact: "Artifact") -> dict[str, Any]:
    path = model.path(artifact)
    state, reason = examine(model, artifact)
    return artifact.to_json() | {
        "path": str(path.resolve()),
        "bytes": path.stat().st_size if path.exists() else None,
        "sha256": artifact.sha256,
        "state": state,
        "reason": reason,
    }


def examine(model: "Model", artifact: "Artifact") -> tuple[str, str | None]:
    """Return ok, stale, corrupt or missing, and why it is not ok."""
    folder = model.path(artifact).parent
    gone = any(not (folder / file).is_file() for file in artifact.files)
    try:
        model.check_files(artifact)
        model.check_parents(artifact)
    except CorruptArtifact as error:
        return "missing" if gone else "corrupt", str(error)
    except StaleArtifact as error:
        return "stale", str(error)
    return "ok", None


def _row(entry: dict[str, Any]) -> Sequence[object]:
    size = format_size(tuple(entry["input_size"])) if entry["input_size"] else None
    figures = [entry[key] for key in ("params_m", "gmacs", "top1", "top5")]
    artifacts = "cannot be read" if entry["error"] else ", ".join(entry["artifacts"]) or None
    return (
        *(entry["name"], entry["architecture"], *figures, size, entry["classes"]),
        *("yes" if entry["weights"] else "no", artifacts),
    )


def _print(described: dict[str, Any]) -> None:
    """Print a described model as tables for a person."""
    how, labels, weights = (described[key] for key in ("preprocess", "labels", "weights"))
    record, published = weights["record"] or {}, described["published"]
    few = ", ".join(labels["first"]) + (", ..." if labels["count"] > len(labels["first"]) else "")
    rows: list[tuple[str, object]] = [
        ("folder", described["folder"]),
        ("architecture", described["architecture"]),
        ("params (M)", described["params_m"]),
        ("GMACs", described["gmacs"]),
        ("features", described["num_features"]),
        ("input size", format_size(how["input_size"])),
        ("resize", f"{how['interpolation']}, crop {how['crop_pct']:g}, {how['crop_mode']}"),
        ("mean", ", ".join(f"{value:g}" for value in how["mean"])),
        ("std", ", ".join(f"{value:g}" for value in how["std"])),
        ("classes", described["classes"]),
        ("labels", f"{few} (from {labels['from']})" if labels["from"] else few),
    ]
    rows += [(f"network {key}", value) for key, value in described["model_args"].items()]
    if published:
        rows += [
            ("published by timm", f"top-1 {published['top1']}, top-5 {published['top5']} %"),
            ("in the paper", f"top-1 {published['paper_top1']}, top-5 {published['paper_top5']} %"),
            ("checkpoint", published["url"]),
        ]
        if described["top1"] is None:
            rows.append(("", "not this model's accuracy: other weights, classes or size"))
    rows.append(("weights", _size(weights["bytes"]) if weights["present"] else "none here"))
    rows += [(f"weights {key}", value) for key, value in record.items() if key != "sha256"]
    rows += [("sha256 at source", record["sha256"])] if "sha256" in record else []
    rows += [("sha256 of the file", weights["sha256"])] if weights["present"] else []
    console.print_table(("", described["name"]), rows)
    print()
    _print_artifacts(described["artifacts"])


def _print_artifacts(artifacts: Sequence[dict[str, Any]]) -> None:
    if not artifacts:
        print("No artifacts. coat-deploy export makes one.")
        return
    columns = (
        *("artifact", "target", "precision", "form", "size", "opset", "file", "state"),
        *("images", "max |delta|", "top-1 agreement", "created", "sha256"),
    )
    rows = []
    for a in artifacts:
        size = format_size(a["size"]) if a["size"] else "dynamic"
        measured = [a["agreement"].get(key) for key in ("images", *_AGREEMENT)]
        named = (a["name"], a["target"], a["precision"], a["form"], size, a["opset"])
        state = (_size(a["bytes"]), a["state"])
        rows.append((*named, *state, *measured, a["created"], a["sha256"][:12]))
    console.print_table(columns, rows)
    for a in artifacts:
        if a["reason"]:
            print(f"\n{a['name']} is {a['state']}: {a['reason']}")


_AGREEMENT = ("max_abs_difference", "top1_agreement")


def _size(count: int | None) -> str | None:
    return None if count is None else f"{count / 2**20:.1f} MiB"
