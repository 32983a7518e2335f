"""The model card: what a trained model is, how it came about, how good it is, how to use it."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from urllib.parse import quote

from coat_deploy.measure.quality import Quality
from coat_deploy.network.variants import get_variant
from coat_deploy.spec import ModelSpec, WeightsRecord, format_size
from coat_deploy.train.card_figures import cells, count, duration, images, percent, with_interval
from coat_deploy.train.card_metadata import dataset, metadata
from coat_deploy.train.markdown import escape, facts_table, printable, table
from coat_deploy.train.recipe import KNOBS, Recipe, get_preset
from coat_deploy.version import __version__

PAPER_URL = "https://arxiv.org/abs/2104.06399"
MAX_NAMES, MAX_ROWS, MAX_CONFUSIONS = 200, 50, 5
"""Classes that are named, classes in the table, pairs that are confused most."""

_FEW_IMAGES = 100
"""Images a class below which its figure is not to be relied on."""
_SWITCHES = {"cpe": "without CPE", "crpe": "without CRPE"}


@dataclass(frozen=True)
class CardFacts:
    """What a model card tells.

    `parameters` and `macs` (of one image at the spec's size) are counts; `labels` name the classes
    of `spec`. `preset` is the one the recipe began from, if any; `weights` are those the training
    began from, None from scratch. `data` is the source as given; `train_images` None of a stream
    that does not tell. `epochs` were trained, in `seconds`, on `machine`, by `processes`; the
    weights are those after `kept_epoch`, None for the last.
    `quality` is of the validation images, None where there are none. Pictures and the recipe are
    files in the folder of the card. `license` is a key of the Hub's list ("apache-2.0").
    """

    name: str
    spec: ModelSpec
    labels: tuple[str, ...]
    parameters: int
    macs: int
    recipe: Recipe
    preset: str | None
    weights: WeightsRecord | None
    data: str
    train_images: int | None
    epochs: int
    seconds: float
    machine: str
    quality: Quality | None
    processes: int = 1
    kept_epoch: int | None = None
    license: str | None = None
    history_picture: str | None = None
    confusion_picture: str | None = None
    recipe_file: str | None = None

    @property
    def opens_in_timm(self) -> bool:
        """Whether timm can make this network: it has none of the ablations' switches."""
        return not self.spec.model_args


def render_card(facts: CardFacts) -> str:
    """Return the README.md of a model folder: YAML for the Hugging Face Hub, then Markdown."""
    assert len(facts.labels) == facts.spec.num_classes
    sections = [
        f"# {escape(facts.name)}\n\n{_summary(facts)}",
        f"## What it is\n\n{_network(facts)}",
        f"## Classes\n\n{_classes(facts.labels)}",
        f"## How it was trained\n\n{_training(facts)}",
        f"## Results\n\n{_results(facts)}",
        f"## How to use it\n\n{_use(facts)}",
        f"## Limits\n\n{_limits(facts)}",
    ]
    return metadata(facts) + "\n" + "\n".join(sections)


def _summary(facts: CardFacts) -> str:
    name, _ = dataset(facts.data)
    text = f"Tells {facts.spec.num_classes} classes of images apart; trained on {escape(name)}."
    if facts.quality:
        text += f" Top-1 {with_interval(facts.quality.top1)} on {images(facts.quality.images)}."
    return f"{text}\n"


def _network(facts: CardFacts) -> str:
    spec, how = facts.spec, facts.spec.preprocess
    variant = get_variant(spec.architecture)
    blocks = "serial and parallel blocks" if variant.parallel_depth else "CoaT-Lite, serial blocks"
    ours = "" if variant.published else "; a size of coat-deploy's own, not one of the paper"
    rows = [
        ("Architecture", f"`{spec.architecture}` ({blocks}{ours})"),
        ("Paper", f"[Co-Scale Conv-Attentional Image Transformers]({PAPER_URL})"),
        ("Parameters", count(facts.parameters)),
        ("MACs an image", count(facts.macs)),
        ("Input", f"RGB, {format_size(how.input_size)}, {how.interpolation}, "
                  f"crop {how.crop_pct:g} ({how.crop_mode})"),
        ("Mean, std", f"{_triple(how.mean)}, {_triple(how.std)}"),
        ("Output", f"{spec.num_classes} logits"),
    ]  # fmt: skip
    if switches := [_switch(key, value) for key, value in spec.model_args.items()]:
        rows.insert(1, ("Departs from it", ", ".join(switches)))
    return facts_table(rows)


def _classes(labels: Sequence[str]) -> str:
    text = ", ".join(escape(label) or "(empty name)" for label in labels[:MAX_NAMES])
    if len(labels) > MAX_NAMES:
        text += f", and {len(labels) - MAX_NAMES} more, in `config.json`"
    return f"In the order of the logits: {text}.\n"


def _training(facts: CardFacts) -> str:
    name, kind = dataset(facts.data)
    told = "a stream" if facts.train_images is None else images(facts.train_images)
    rows = [
        ("Data", f"{escape(name)} ({escape(kind)})" if name != kind else escape(name)),
        ("Trained on", told),
        ("Measured on", images(facts.quality.images) if facts.quality else "nothing"),
        ("Began from", _origin(facts.weights)),
        ("Epochs", f"{facts.epochs} of {facts.recipe.epochs}{_kept(facts)}"),
        ("Time", duration(facts.seconds)),
        ("Machine", escape(facts.machine) + _of_processes(facts.processes)),
        ("Made by", f"coat-deploy {__version__}"),
    ]
    text = f"{facts_table(rows)}\n{_recipe(facts)}"
    return text + _picture(facts.history_picture, "Loss, accuracy and learning rate over epochs")


def _recipe(facts: CardFacts) -> str:
    begun = get_preset(facts.preset) if facts.preset else Recipe()
    whose = f"preset `{facts.preset}`" if facts.preset else "authors' recipe for ImageNet"
    rows = [
        (f"`{name}`", _value(value), _value(usual), escape(knob.help))
        for name, knob in KNOBS.items()
        if (value := getattr(facts.recipe, name)) != (usual := getattr(begun, name))
    ]
    whole = f" ([the whole recipe]({quote(facts.recipe_file)}))" if facts.recipe_file else ""
    if not rows:
        return f"The recipe is the {whose}, unchanged{whole}.\n"
    columns = ("field", "here", "there", "what it is")
    return f"What departs from the {whose}{whole}:\n\n{table(columns, rows, len(columns))}"


def _results(facts: CardFacts) -> str:
    quality = facts.quality
    if quality is None:
        return "Not measured: the data had no validation images.\n"
    rows = [("top-1", *cells(quality.top1))]
    if facts.spec.num_classes > 5:  # of five, one is always among the first five
        rows.append(("top-5", *cells(quality.top5)))
    rows.append(("top-1, mean of classes", percent(quality.mean_class_accuracy), ""))
    if quality.calibration_error is not None:
        rows.append(("calibration error", percent(quality.calibration_error), ""))
        rows.append(("mean confidence", percent(quality.mean_confidence or 0.0), ""))
        rows.append(("negative log-likelihood", f"{quality.nll:.3f}", ""))
    parts = [
        f"On {images(quality.images)}, of which no step of the training saw any.\n",
        table(("measure", "value", "95% interval"), rows),
        _per_class(quality, facts.labels),
        _confused(quality, facts.labels),
    ]
    if quality.non_finite:
        parts.append(f"{images(quality.non_finite)} had NaN or infinite logits: wrong.\n")
    picture = _picture(facts.confusion_picture, "Confusion matrix")
    return "\n".join(part for part in parts if part) + picture


def _per_class(quality: Quality, labels: Sequence[str]) -> str:
    found = [(s, label) for s, label in zip(quality.per_class, labels, strict=True) if s]
    heading = ""
    if len(found) > MAX_ROWS:
        found = sorted(found, key=lambda row: row[0].value)[:MAX_ROWS]
        heading = f"The {MAX_ROWS} classes it knows least:\n\n"
    rows = [(escape(label), str(s.total), str(s.correct), *cells(s)) for s, label in found]
    columns = ("class", "images", "right", "top-1", "95% interval")
    return heading + table(columns, rows)


def _confused(quality: Quality, labels: Sequence[str]) -> str:
    rows = [
        (escape(labels[pair.label]), escape(labels[pair.predicted]), str(pair.images))
        for pair in quality.most_confused(MAX_CONFUSIONS)
    ]
    return table(("most often", "taken for", "images"), rows, texts=2) if rows else ""


def _use(facts: CardFacts) -> str:
    folder = shlex.quote(f"./{printable(facts.name)}")
    public = facts.data == "digits" or facts.data.startswith("hub:")
    data = shlex.quote(printable(facts.data)) if public else "FOLDER"
    text = (
        "From the folder that this one lies in:\n\n```sh\n"
        f"coat-deploy predict {folder} photo.jpg\n"
        f"coat-deploy export {folder}                 # to ONNX, proven equal to PyTorch\n"
        f"coat-deploy evaluate {folder} --data {data}\n```\n"
    )
    if not facts.opens_in_timm:
        return f"{text}\ntimm does not know this network; coat-deploy does.\n"
    return (
        f"{text}\nOr without coat-deploy, in Python:\n\n```python\nimport timm\n\n"
        f"model = timm.create_model({f'local-dir:./{printable(facts.name)}'!r}, pretrained=True)\n"
        "config = timm.data.resolve_model_data_config(model)\n"
        "transform = timm.data.create_transform(**config, is_training=False)\n```\n"
    )


def _limits(facts: CardFacts) -> str:
    lines = [
        f"It takes every image for one of its {facts.spec.num_classes} classes, whatever it shows.",
        "It has learnt from one source of images; what others look like it has not seen, and its "
        "figures are of that source alone.",
    ]
    quality = facts.quality
    if quality is None:
        lines.append("Its accuracy is not known.")
    else:
        fewest = min(share.total for share in quality.per_class if share)
        if fewest < _FEW_IMAGES:
            lines.append(f"A class was measured on as few as {images(fewest)}: mind the intervals.")
        if absent := sum(share is None for share in quality.per_class):
            lines.append(f"{absent} of its classes had no image to be measured on.")
        if facts.recipe.patience:
            lines.append(
                "The epoch that was kept is the one that these images liked best, so the figures "
                "flatter it."
            )
    if not facts.license:
        lines.append(
            "No licence is stated yet: whoever publishes the model adds `license` to the head of "
            "this file."
        )
    if facts.weights and facts.weights.source in ("timm", "official"):
        lines.append("The weights it began from are the CoaT authors', under Apache-2.0.")
    return "".join(f"- {line}\n" for line in lines)


def _picture(path: str | None, what: str) -> str:
    return f"\n![{what}]({quote(path)})\n" if path else ""


def _origin(weights: WeightsRecord | None) -> str:
    if weights is None:
        return "scratch"
    source = escape(weights.source.replace("\\", "/").rstrip("/").rpartition("/")[2])
    return f"{source} (sha256 {weights.sha256[:12]})" if weights.sha256 else source


def _kept(facts: CardFacts) -> str:
    last = facts.kept_epoch in (None, facts.epochs)
    return "" if last else f", of which epoch {facts.kept_epoch} was kept"


def _of_processes(count: int) -> str:
    return f", {count} processes" if count > 1 else ""


def _switch(key: str, value: object) -> str:
    return _SWITCHES[key] if value is False and key in _SWITCHES else f"{key} {value}"


def _value(value: object) -> str:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    # Weights to begin with may be named by a path.
    return escape(text.rstrip("/").rpartition("/")[2]) or "-"


def _triple(values: tuple[float, float, float]) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"
