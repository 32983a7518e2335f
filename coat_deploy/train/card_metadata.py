"""The YAML at the head of a model card, by which the Hugging Face Hub files a model.

Fields: the Hub's documentation of model cards, and `huggingface_hub.ModelCardData`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from coat_deploy.train.markdown import printable

if TYPE_CHECKING:
    from coat_deploy.train.card import CardFacts

_HUB, _LOADERS = "hub", ("parquet", "webdataset")
_IMAGE_FOLDER = "imagefolder"


def metadata(facts: "CardFacts") -> str:
    """Return the YAML between its two lines of dashes."""
    document: dict[str, Any] = {}
    if facts.license:
        document["license"] = facts.license
    document |= {
        "library_name": "timm" if facts.opens_in_timm else "coat-deploy",
        "pipeline_tag": "image-classification",
        "tags": ["image-classification", "coat", "vision-transformer", "timm", "coat-deploy"],
    }
    if not facts.opens_in_timm:
        document["tags"].remove("timm")
    if facts.weights and facts.weights.source == "timm":
        document["base_model"] = f"timm/{facts.spec.architecture}.in1k"
    name, kind = dataset(facts.data)
    if facts.data.startswith(f"{_HUB}:"):
        document["datasets"] = [kind]
    document["metrics"] = ["accuracy"]
    if facts.quality:
        document["model-index"] = [{"name": facts.name, "results": [_results(facts, name, kind)]}]
    return "---\n" + "".join(f"{line}\n" for line in _yaml(document)) + "---\n"


def dataset(source: str) -> tuple[str, str]:
    """Return name and type of a source of data, as the Hub's model index has them.

    Of a path only its last part: where it lay is nobody's business.
    """
    kind, _, place = source.partition(":")
    if kind == _HUB and place:
        return place.partition(":")[0], place.partition(":")[0]
    if source == "digits":
        return "scikit-learn digits", "digits"
    path = Path(place if kind in _LOADERS else source)
    if "*" in path.name:
        path = path.parent
    name = path.name if path.name not in ("", "..") else path.resolve().name
    return name or "images", kind if kind in _LOADERS else _IMAGE_FOLDER


def _results(facts: "CardFacts", name: str, kind: str) -> dict[str, Any]:
    assert facts.quality
    shares = {"top-1": facts.quality.top1}
    if facts.spec.num_classes > 5:
        shares["top-5"] = facts.quality.top5
    return {
        "task": {"type": "image-classification", "name": "Image Classification"},
        "dataset": {"name": name, "type": kind, "split": "validation"},
        "metrics": [
            {"type": "accuracy", "value": share.value, "name": f"{which} accuracy"}
            for which, share in shares.items()
        ],
    }


def _yaml(value: Mapping[str, Any] | Sequence[Any]) -> Iterator[str]:
    """Yield the lines of a block of YAML."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            if isinstance(inner, Mapping | list):
                yield f"{key}:"
                yield from (f"  {line}" for line in _yaml(inner))
            else:
                yield f"{key}: {_scalar(inner)}"
        return
    for item in value:
        first, *rest = _yaml(item) if isinstance(item, Mapping) else [_scalar(item)]
        yield f"- {first}"
        yield from (f"  {line}" for line in rest)


def _scalar(value: str | float) -> str:
    """Return a text as JSON writes it, which is YAML; a number without an exponent."""
    if isinstance(value, str):
        # Escapes of JSON for what lies beyond 16 bits are not those of YAML: written as it is.
        return json.dumps(printable(value), ensure_ascii=False)
    return f"{value:.6f}"
