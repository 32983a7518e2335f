"""What a model is apart from its tensors: `config.json`, read and written.

The file is in the Hugging Face Hub's form for timm, so `timm.create_model("local-dir:FOLDER")`
opens the same folder. timm rejects unknown keys inside `pretrained_cfg` and ignores them at the
top level: what is ours (`weights`, `label_set`, `variant`) stays at the top.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from coat_deploy.errors import SpecError, UsageError, unknown_name

CropMode = Literal["center", "squash", "border"]
Interpolation = Literal["bicubic", "bilinear", "nearest", "lanczos"]
Size = tuple[int, int]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
MODEL_ARGS: Mapping[str, tuple[bool | str, ...]] = {
    "cpe": (True, False),
    "crpe": (True, False),
    "co_scale": ("interpolation", "direct", "none"),
}
"""Network switches that `model_args` of a config may set, and to what: see `network.coat.CoaT`."""
TIMM_ARGS = {"in_chans": 3, "global_pool": "token"}
"""What timm writes among `model_args`, beside sizes that stand elsewhere; it has no choice."""

TIMM_SIZES = ("embed_dims", "serial_depths", "mlp_ratios", "parallel_depth")
"""Sizes among `model_args` by which timm makes a variant that it has no name for."""

MAX_SIDE = 4096
"""Largest input side accepted from a config or a flag: a typing error, not an image, beyond it."""
MAX_CLASSES = 1_000_000
MAX_COLOUR = 1000.0
"""Largest mean or std, in shares of white, and the inverse of the smallest std."""


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

    @classmethod
    def from_json(cls, record: Any, subject: str) -> "WeightsRecord | None":
        """Read a record, or nothing from None; `subject` names its file in errors.

        Raises: SpecError.
        """
        return _Reader(subject).weights(record)


@dataclass(frozen=True)
class TimmForm:
    """How timm is told to make a variant that it does not know: one that it does, and sizes.

    `args` are `TIMM_SIZES`: a list of a number a scale, or a number.
    """

    architecture: str
    args: Mapping[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """A model's `config.json`.

    `label_names` holds one name a class, or nothing. `label_set` names a list shipped with this
    package instead ("imagenet-1k"), so that eight configs need not repeat a thousand names.
    `model_args` are switches of the network (`MODEL_ARGS`) that differ from its defaults.
    `timm` says how timm makes an `architecture` of our own.
    """

    architecture: str
    num_classes: int
    num_features: int
    preprocess: Preprocess
    label_names: tuple[str, ...] = ()
    label_set: str | None = None
    weights: WeightsRecord | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    timm: TimmForm | None = None

    def with_classes(self, num_classes: int, label_names: Sequence[str] = ()) -> "ModelSpec":
        """Return the spec of the same network with another classifier, with these names if any.

        For another number of classes neither the old names nor the old weights are any use.
        """
        names = tuple(label_names)
        if num_classes != self.num_classes:
            return dataclasses.replace(
                self, num_classes=num_classes, label_names=names, label_set=None, weights=None
            )
        return dataclasses.replace(self, label_names=names, label_set=None) if names else self

    def digest(self) -> str:
        """Return the SHA-256 of what an exported graph depends on; provenance is left out."""
        document = self.to_json()
        document.pop("weights", None)
        document["pretrained_cfg"].pop("fixed_input_size")
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
                # timm builds CoaT for one size, and takes it from here only if told so.
                "fixed_input_size": True,
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
        args = dict(self.model_args)
        if self.timm:
            document["architecture"] = self.timm.architecture
            document["variant"] = self.architecture
            args = {**self.timm.args, **args}
        if args:
            document["model_args"] = args
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
            raise self.fail(f"not a JSON object (got {document!r:.60}).")
        cfg = document.get("pretrained_cfg")
        if not isinstance(cfg, dict):
            raise self.fail("'pretrained_cfg' is missing or no object. Compare models/README.md.")
        classes = document.get("num_classes", cfg.get("num_classes"))
        num_classes = self.count("num_classes", classes, MAX_CLASSES)
        architecture = self.text(document, "architecture")
        variant = self.text(document, "variant", required=False)
        return ModelSpec(
            architecture=variant or architecture,
            num_classes=num_classes,
            num_features=self.count("num_features", document.get("num_features", 0), MAX_CLASSES),
            preprocess=self.preprocess(cfg),
            label_names=self.label_names(document.get("label_names"), num_classes),
            label_set=self.text(document, "label_set", required=False),
            weights=self.weights(document.get("weights")),
            model_args=self.model_args(document.get("model_args"), num_classes, bool(variant)),
            timm=self.timm(architecture, document.get("model_args") or {}) if variant else None,
        )

    def timm(self, architecture: str, args: Mapping[str, Any]) -> TimmForm:
        """Return how timm makes the variant, of `model_args` that were checked to be objects."""
        sizes = {key: args[key] for key in TIMM_SIZES if key in args}
        for key, value in sizes.items():
            numbers = value if isinstance(value, list) else [value]
            if len(numbers) not in (1, 4) or any(type(n) is not int or n < 0 for n in numbers):
                raise self.fail(f"'model_args.{key}' must be whole numbers (got {value!r:.60}).")
        return TimmForm(architecture, sizes)

    def text(self, document: Mapping[str, Any], key: str, required: bool = True) -> Any:
        value = document.get(key)
        if (value or required) and not (value and isinstance(value, str)):
            raise self.fail(f"'{key}' must be a text (got {value!r:.60}).")
        return value or None

    def count(self, key: str, value: Any, most: int) -> int:
        if type(value) is not int or not 0 <= value <= most:
            raise self.fail(f"'{key}' must be 0 to {most} (got {value!r:.60}).")
        return value

    def label_names(self, names: Any, num_classes: int) -> tuple[str, ...]:
        if not isinstance(names or [], list) or not all(isinstance(n, str) for n in names or ()):
            raise self.fail("'label_names' must be a list of texts, one a class.")
        if names and len(names) != num_classes:
            raise self.fail(f"'label_names' has {len(names)} names for {num_classes} classes.")
        return tuple(names or ())

    def model_args(self, args: Any, num_classes: int, of_variant: bool) -> dict[str, Any]:
        """Return our switches; timm's are checked, sizes of a variant read elsewhere."""
        if not isinstance(args or {}, dict):
            raise self.fail(f"'model_args' must be an object (got {args!r:.60}).")
        fixed = {**TIMM_ARGS, "num_classes": num_classes}
        known: dict[str, tuple[Any, ...]] = {key: (value,) for key, value in fixed.items()}
        known |= MODEL_ARGS
        ignored = ("img_size", *(TIMM_SIZES if of_variant else ()))
        switches = {key: value for key, value in (args or {}).items() if key not in ignored}
        for key, value in switches.items():
            if key not in known:
                raise self.fail(unknown_name("network switch in 'model_args'", key, MODEL_ARGS))
            if type(value) is not type(known[key][0]) or value not in known[key]:
                choices = " or ".join(json.dumps(choice) for choice in known[key])
                raise self.fail(f"'model_args.{key}' must be {choices} (got {value!r:.60}).")
        return {key: value for key, value in switches.items() if key in MODEL_ARGS}

    def preprocess(self, cfg: Mapping[str, Any]) -> Preprocess:
        crop_pct = cfg.get("crop_pct", 0.875)
        if not _is_number(crop_pct) or not 0.1 <= crop_pct <= 1:
            raise self.fail(f"'crop_pct' must be between 0.1 and 1 (got {crop_pct!r:.60}).")
        return Preprocess(
            input_size=self.input_size(cfg.get("input_size", (3, 224, 224))),
            mean=self.colour(cfg, "mean", IMAGENET_MEAN, -MAX_COLOUR),
            std=self.colour(cfg, "std", IMAGENET_STD, 1 / MAX_COLOUR),
            interpolation=self.choice(cfg, "interpolation", "bicubic", get_args(Interpolation)),
            crop_pct=float(crop_pct),
            crop_mode=self.choice(cfg, "crop_mode", "center", get_args(CropMode)),
        )

    def input_size(self, shape: Any) -> Size:
        sound = isinstance(shape, list | tuple) and len(shape) == 3 and shape[0] == 3
        if not sound or not all(type(s) is int and 0 < s <= MAX_SIDE for s in shape):
            raise self.fail(
                f"'input_size' must be [3, height, width], sides up to {MAX_SIDE} "
                f"(got {shape!r:.60})."
            )
        return (shape[1], shape[2])

    def colour(
        self,
        cfg: Mapping[str, Any],
        key: str,
        default: tuple[float, float, float],
        least: float,
    ) -> tuple[float, float, float]:
        value = cfg.get(key, default)
        sound = isinstance(value, list | tuple) and len(value) == 3
        if not sound or not all(_is_number(v) and least <= v <= MAX_COLOUR for v in value):
            raise self.fail(
                f"'{key}' must be three numbers, {least:g} to {MAX_COLOUR:g} (got {value!r:.60})."
            )
        return (float(value[0]), float(value[1]), float(value[2]))

    def choice(self, cfg: Mapping[str, Any], key: str, default: str, known: tuple[str, ...]) -> Any:
        value = cfg.get(key) or default
        if value not in known:
            raise self.fail(unknown_name(f"'{key}'", str(value), known))
        return value

    def weights(self, record: Any) -> WeightsRecord | None:
        if record is None:
            return None
        if not isinstance(record, dict) or not isinstance(record.get("source"), str):
            raise self.fail(f"'weights' must be an object with a 'source' (got {record!r:.60}).")
        url, sha256 = (self.text(record, key, required=False) for key in ("url", "sha256"))
        return WeightsRecord(record["source"], url, sha256)


def _is_number(value: Any) -> bool:
    return type(value) in (int, float)


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
