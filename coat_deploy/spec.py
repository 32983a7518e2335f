"""What a model is apart from its tensors: `config.json`, read and written.

The file is in the Hugging Face Hub's form for timm, so `timm.create_model("local-dir:FOLDER")`
opens the same folder. timm rejects unknown keys inside `pretrained_cfg` and ignores them at the
top level: what is ours (`weights`, `label_set`) stays at the top.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from coat_deploy.errors import SpecError, UsageError, unknown_name

CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos"]
Size = tuple[int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODEL_ARGS = ("cpe", "crpe", "co_scale")
"""Network switches that `model_args` of a config may set: see `network.coat.CoaT`."""

MAX_SIDE = 4096
"""Largest input side accepted from a config or a flag: a typing error, not an image, beyond it."""


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the network's input; `input_size` is (height, width) in pixels.

    `crop_pct` is the share of the resized image that the crop keeps; `crop_mode` as in timm:
    "center" resizes the shorter side and crops, "squash" ignores the aspect ratio, "border"
    keeps the whole image and pads it with the mean.
    """

    input_size: Size
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    interpolation: Interpolation = "bicubic"
    crop_pct: float = 0.9
    crop_mode: CropMode = "center"

    def at(self, size: Size) -> "Preprocess":
        """Return the same preprocessing for another input size."""
        return dataclasses.replace(self, input_size=size)


@dataclass(frozen=True)
class WeightsRecord:
    """Where the weights came from: a source as given to `--weights`, its URL, its SHA-256."""

    source: str
    url: str | None = None
    sha256: str | None = None

    def to_json(self) -> dict[str, str]:
        """Return the record without what is not known."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value}


@dataclass(frozen=True)
class ModelSpec:
    """A model's `config.json`.

    `label_names` holds one name a class, or nothing. `label_set` names a list shipped with this
    package instead ("imagenet-1k"), so that eight configs need not repeat a thousand names.
    `model_args` are switches of the network (`MODEL_ARGS`) that differ from its defaults.
    """

    architecture: str
    num_classes: int
    num_features: int
    preprocess: Preprocess
    label_names: tuple[str, ...] = ()
    label_set: str | None = None
    weights: WeightsRecord | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)

    def digest(self) -> str:
        """Return the SHA-256 of what an exported graph depends on; provenance is left out."""
        document = self.to_json()
        document.pop("weights", None)
        return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Return the document of `config.json`."""
        p = self.preprocess
        document: dict[str, Any] = {
            "architecture": self.architecture,
            "num_classes": self.num_classes,
            "num_features": self.num_features,
            "pretrained_cfg": {
                "input_size": [3, *p.input_size],
                "interpolation": p.interpolation,
                "crop_pct": p.crop_pct,
                "crop_mode": p.crop_mode,
                "mean": list(p.mean),
                "std": list(p.std),
                "num_classes": self.num_classes,
                "first_conv": "patch_embed1.proj",
                "classifier": "head",
            },
        }
        if self.model_args:
            document["model_args"] = dict(self.model_args)
        if self.label_names:
            document["label_names"] = list(self.label_names)
        if self.label_set:
            document["label_set"] = self.label_set
        if self.weights:
            document["weights"] = self.weights.to_json()
        return document

    @classmethod
    def from_json(cls, document: Any, subject: str = "config.json") -> "ModelSpec":
        """Read the document of a `config.json`, ours or timm's; `subject` names it in errors.

        Raises: SpecError naming the field, what it holds and what it should hold.
        """
        return _Reader(subject).spec(document)


@dataclass(frozen=True)
class _Reader:
    """Reads one document field by field, so that every error names its file and field."""

    subject: str

    def fail(self, what: str) -> SpecError:
        return SpecError(f"{self.subject}: {what}")

    def spec(self, document: Any) -> ModelSpec:
        if not isinstance(document, dict):
            raise self.fail(f"not a JSON object (got {type(document).__name__}).")
        cfg = document.get("pretrained_cfg")
        if not isinstance(cfg, dict):
            raise self.fail("'pretrained_cfg' is missing or no object. Compare models/README.md.")
        architecture = self.typed(document, "architecture", str)
        num_classes = document.get("num_classes", cfg.get("num_classes"))
        if not isinstance(num_classes, int) or not 0 <= num_classes <= 1_000_000:
            raise self.fail(f"'num_classes' must be 0 to 1000000 (got {num_classes!r}).")
        names = document.get("label_names", ())
        if not isinstance(names, list | tuple) or not all(isinstance(n, str) for n in names):
            raise self.fail("'label_names' must be a list of strings, one a class.")
        if names and len(names) != num_classes:
            raise self.fail(f"'label_names' has {len(names)} names for {num_classes} classes.")
        args = document.get("model_args", {})
        if not isinstance(args, dict):
            raise self.fail(f"'model_args' must be an object (got {args!r}).")
        for key in args:
            if key not in MODEL_ARGS:
                raise self.fail(unknown_name("network switch", key, MODEL_ARGS))
        num_features = document.get("num_features", 0)
        if not isinstance(num_features, int) or num_features < 0:
            raise self.fail(f"'num_features' must be a count (got {num_features!r}).")
        return ModelSpec(
            architecture=architecture,
            num_classes=num_classes,
            num_features=num_features,
            preprocess=self.preprocess(cfg),
            label_names=tuple(names),
            label_set=document.get("label_set"),
            weights=self.weights(document.get("weights")),
            model_args=args,
        )

    def typed(self, document: Mapping[str, Any], key: str, kind: type) -> Any:
        if not isinstance(document.get(key), kind):
            raise self.fail(f"'{key}' must be a {kind.__name__} (got {document.get(key)!r}).")
        return document[key]

    def preprocess(self, cfg: Mapping[str, Any]) -> Preprocess:
        shape = cfg.get("input_size", (3, 224, 224))
        if (
            not isinstance(shape, list | tuple)
            or len(shape) != 3
            or shape[0] != 3
            or not all(isinstance(s, int) and 0 < s <= MAX_SIDE for s in shape)
        ):
            raise self.fail(
                f"'input_size' must be [3, height, width], sides up to {MAX_SIDE} (got {shape!r})."
            )
        crop_pct = cfg.get("crop_pct", 0.875)
        if not isinstance(crop_pct, int | float) or not 0.1 <= crop_pct <= 1:
            raise self.fail(f"'crop_pct' must be between 0.1 and 1 (got {crop_pct!r}).")
        return Preprocess(
            input_size=(shape[1], shape[2]),
            mean=self.colour(cfg, "mean", IMAGENET_MEAN),
            std=self.colour(cfg, "std", IMAGENET_STD),
            interpolation=self.choice(cfg, "interpolation", "bicubic", get_args(Interpolation)),
            crop_pct=float(crop_pct),
            crop_mode=self.choice(cfg, "crop_mode", "center", get_args(CropMode)),
        )

    def colour(
        self, cfg: Mapping[str, Any], key: str, default: tuple[float, float, float]
    ) -> tuple[float, float, float]:
        value = cfg.get(key, default)
        if (
            not isinstance(value, list | tuple)
            or len(value) != 3
            or not all(isinstance(v, int | float) for v in value)
            or (key == "std" and min(value) <= 0)
        ):
            raise self.fail(f"'{key}' must be three numbers, 'std' above 0 (got {value!r}).")
        return (float(value[0]), float(value[1]), float(value[2]))

    def choice(self, cfg: Mapping[str, Any], key: str, default: str, known: tuple[str, ...]) -> Any:
        value = cfg.get(key, default) or default
        if value not in known:
            raise self.fail(unknown_name(key, str(value), known))
        return value

    def weights(self, record: Any) -> WeightsRecord | None:
        if record is None:
            return None
        if not isinstance(record, dict) or not isinstance(record.get("source"), str):
            raise self.fail(f"'weights' must be an object with a 'source' (got {record!r}).")
        return WeightsRecord(record["source"], record.get("url"), record.get("sha256"))


def parse_size(text: str) -> Size:
    """Read "224", "224x320" (height x width) as (height, width).

    Raises: UsageError for anything else, or a side of 0 or above `MAX_SIDE`.
    """
    parts = text.lower().split("x")
    try:
        sides = tuple(int(part) for part in parts)
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2) or not all(0 < side <= MAX_SIDE for side in sides):
        raise UsageError(
            f"size '{text}': not a size (expected SIDE or HEIGHTxWIDTH, 1 to {MAX_SIDE}). "
            "Write for example 224 or 224x320."
        )
    return (sides[0], sides[-1])


def format_size(size: Size) -> str:
    """Return a size as `HEIGHTxWIDTH`, what `parse_size` reads."""
    return f"{size[0]}x{size[1]}"
