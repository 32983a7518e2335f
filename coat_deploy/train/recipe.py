"""How a network is trained: every number of it, in one frozen value.

The defaults are the authors' recipe for ImageNet (their training scripts, mlpc-ucsd/CoaT):
8 processes of 256 images, AdamW, 300 epochs, a rate that rises from 1e-6 to 2e-3 and falls to
1e-5. A field of `Recipe` is a flag of `coat-deploy train` and a key of a recipe file (TOML), with
the same name. Importing this file imports no PyTorch.

Two things are otherwise than there: crops are resampled bilinearly (theirs bicubic), and what is
erased becomes the mean colour (theirs noise).
"""

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.spec import MAX_SIDE

Precision = Literal["fp32", "bf16", "fp16", "auto"]
MAX_RECIPE_BYTES = 1 << 20
OPTIMISER, AUGMENTATION, NETWORK, COMPUTATION = (
    "Optimiser", "Augmentation", "Network", "Computation",
)  # fmt: skip
"""Groups of fields, for the help."""


@dataclass(frozen=True)
class Knob:
    """What a field is for, and which values it may have: a closed range, or a choice of texts."""

    group: str
    help: str
    least: float = 0.0
    most: float = float("inf")
    choices: tuple[str, ...] = ()


def _knob(default: Any, group: str, help: str, *, choices: tuple[str, ...] = (), **r: float) -> Any:
    return field(default=default, metadata={"knob": Knob(group, help, choices=choices, **r)})


@dataclass(frozen=True)
class Recipe:
    """Every number of a training; see each field's knob, and `PRESETS`.

    Raises: UsageError for a value of the wrong type, out of its range, or at odds with another.
    """

    epochs: int = _knob(300, OPTIMISER, "Passes over the training images.", least=1, most=100_000)
    batch_size: int = _knob(256, OPTIMISER, "Images a step, in each process.", least=1, most=65_536)
    accumulate: int = _knob(
        1, OPTIMISER, "Batches whose gradients are added up for one step.", least=1, most=4096
    )
    learning_rate: float = _knob(
        5e-4, OPTIMISER, "Peak learning rate, for every 512 images of a step.", least=0, most=100
    )
    warmup_epochs: float = _knob(
        5.0, OPTIMISER, "Epochs over which the rate rises to its peak.", most=100_000
    )
    warmup_factor: float = _knob(
        5e-4, OPTIMISER, "Share of the peak that the rate begins with.", most=1
    )
    final_factor: float = _knob(
        5e-3, OPTIMISER, "Share of the peak that the cosine ends with; 1: constant.", most=1
    )
    weight_decay: float = _knob(
        0.05, OPTIMISER, "Of weights; biases, norms and class tokens have none.", most=10
    )
    layer_decay: float = _knob(
        1.0, OPTIMISER, "Factor on the rate for each layer further from the head.", least=0.01,
        most=1,
    )  # fmt: skip
    clip_norm: float = _knob(0.0, OPTIMISER, "Largest norm of a gradient; 0: any.", most=1e6)
    ema_decay: float = _knob(
        0.99996, OPTIMISER, "Of the averaged weights that are evaluated and kept; 0: no average.",
        most=0.9999999,
    )  # fmt: skip

    crop_min: float = _knob(
        0.08, AUGMENTATION,
        "Least share of an image that a crop shows; 1: all of it, within crop_aspect.",
        least=0.001, most=1,
    )  # fmt: skip
    crop_aspect: float = _knob(
        4 / 3, AUGMENTATION, "Largest ratio of a crop's sides.", least=1, most=10
    )
    flip: float = _knob(
        0.5, AUGMENTATION, "Share of images mirrored; 0 where left and right matter.", most=1
    )
    rotate: float = _knob(0.0, AUGMENTATION, "Largest rotation, in degrees.", most=180)
    shift: float = _knob(0.0, AUGMENTATION, "Largest shift, as a share of the side.", most=1)
    rand_augment: int = _knob(
        2, AUGMENTATION, "Operations of RandAugment on each image; 0: none.", most=8
    )
    rand_augment_magnitude: float = _knob(
        9.0, AUGMENTATION, "Strength of RandAugment's operations, 0 to 10.", most=10
    )
    jitter: float = _knob(
        0.0, AUGMENTATION, "Change of brightness, contrast and saturation, up and down.", most=1
    )
    erase: float = _knob(0.25, AUGMENTATION, "Share of images with an erased rectangle.", most=1)
    mixup: float = _knob(
        0.8, AUGMENTATION, "Alpha of mixup's Beta distribution; 0: no mixup.", most=100
    )
    cutmix: float = _knob(
        1.0, AUGMENTATION, "Alpha of CutMix's Beta distribution; 0: no CutMix.", most=100
    )
    mix_share: float = _knob(
        1.0, AUGMENTATION, "Share of batches that are mixed, by one of the two in turn.", most=1
    )
    mix_until: float = _knob(
        1.0, AUGMENTATION, "Share of the training after which no batch is mixed.", most=1
    )
    label_smoothing: float = _knob(
        0.1, AUGMENTATION, "Share of the target spread over all classes.", most=0.99
    )
    repeats: int = _knob(
        3, AUGMENTATION, "Repeated augmentation: times an image is seen in an epoch that shows "
        "as many images as there are.", least=1, most=64,
    )  # fmt: skip

    init: str = _knob(
        "scratch", NETWORK, "Weights to begin with: scratch, timm, official, the name or folder "
        "of a model, or a file. Another number of classes gets a new head.",
    )  # fmt: skip
    size: int = _knob(
        0, NETWORK, "Side of the images the model is for; 0: the variant's own.", most=MAX_SIDE
    )
    train_size: int = _knob(
        0, NETWORK, "Side of the crops it is trained on; 0: the same.", most=MAX_SIDE
    )
    crop_pct: float = _knob(
        0.9, NETWORK, "Share of the shorter side that evaluation and use crop to.", least=0.1,
        most=1,
    )  # fmt: skip
    drop_path: float = _knob(
        0.0, NETWORK, "Probability that a residual branch is left out for an image.", most=0.99
    )

    precision: Precision = _knob(
        "fp32", COMPUTATION, "fp32, or autocast to bf16 or fp16; auto: bf16 where the device has "
        "matrix units for it.", choices=("fp32", "bf16", "fp16", "auto"),
    )  # fmt: skip
    channels_last: bool = _knob(True, COMPUTATION, "Lay images out channels last.")
    compile: bool = _knob(False, COMPUTATION, "Compile the network with torch.compile.")
    gradient_checkpointing: bool = _knob(
        False, COMPUTATION, "Recompute blocks in the backward pass, to save memory."
    )
    deterministic: bool = _knob(
        False, COMPUTATION, "Use the deterministic algorithms of a GPU; a CPU's always are."
    )
    workers: int = _knob(
        4, COMPUTATION, "Processes that decode images, where not all are held in memory.", most=256
    )
    memory_gib: float = _knob(
        4.0, COMPUTATION, "Decoded images are held in memory where they fit into so many GiB.",
        most=4096,
    )  # fmt: skip
    checkpoint_minutes: float = _knob(
        5.0, COMPUTATION, "Minutes between checkpoints; 0: after every step.", most=100_000
    )
    validate_every: int = _knob(
        1, COMPUTATION, "Epochs between evaluations; the last one always counts.", least=1,
        most=100_000,
    )  # fmt: skip
    patience: int = _knob(
        0, COMPUTATION, "Stop after so many evaluations without a better top-1 and keep the best; "
        "0: never, and keep the last.", most=100_000,
    )  # fmt: skip
    seed: int = _knob(0, COMPUTATION, "Of everything that is drawn.", most=2**31 - 1)

    def __post_init__(self) -> None:
        """Check every value, by its knob."""
        for name, knob in KNOBS.items():
            _check(name, getattr(self, name), knob)
        if self.epochs < self.warmup_epochs:
            raise UsageError(
                f"warmup_epochs: longer than the training (got {self.warmup_epochs:g}, expected at "
                f"most {self.epochs} epochs). Lower it, or raise epochs."
            )

    def replace(self, changes: Mapping[str, Any]) -> "Recipe":
        """Return the recipe with `changes`, checked. Raises UsageError, for unknown names too."""
        for name in changes:
            _knob_of(name)
        return dataclasses.replace(self, **{k: _widened(k, v) for k, v in changes.items()})

    def to_toml(self) -> str:
        """Return the recipe as a TOML file, in groups, every field with what it is for."""
        lines: list[str] = []
        group = None
        for name, knob in KNOBS.items():
            if knob.group != group:
                group = knob.group
                lines += [f"# {group}", ""] if not lines else ["", f"# {group}", ""]
            lines.append(f"{name} = {_literal(getattr(self, name))}  # {knob.help}")
        return "\n".join(lines) + "\n"


KNOBS: Mapping[str, Knob] = {f.name: f.metadata["knob"] for f in dataclasses.fields(Recipe)}
_TYPES: Mapping[str, type] = {f.name: type(f.default) for f in dataclasses.fields(Recipe)}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The authors' scripts: https://github.com/mlpc-ucsd/CoaT, the defaults above.
    "imagenet": {},
    # From published or own weights to other classes: layers near the pixels change least.
    "finetune": {
        "init": "timm", "epochs": 30, "batch_size": 64, "learning_rate": 2e-3,
        "warmup_epochs": 3.0, "layer_decay": 0.75, "clip_norm": 1.0, "ema_decay": 0.999,
        "crop_min": 0.25, "mixup": 0.2, "mix_share": 0.5, "repeats": 1, "drop_path": 0.1,
    },
    # The authors' second stage for CoaT-Lite Medium: 6 epochs of 8 x 32 images at 384 pixels, at
    # a constant rate of 5e-6.
    "finetune-384": {
        "init": "timm", "size": 384, "crop_pct": 1.0, "epochs": 6, "batch_size": 32,
        "learning_rate": 1e-5, "warmup_epochs": 0.0, "final_factor": 1.0, "weight_decay": 1e-8,
        "clip_norm": 5.0, "ema_decay": 0.0, "drop_path": 0.2,
    },
    # From scratch on thousands of images, in minutes on a CPU.
    "small": {
        "epochs": 300, "batch_size": 64, "learning_rate": 9e-3, "warmup_epochs": 5.0,
        "final_factor": 0.01, "weight_decay": 0.1, "clip_norm": 1.0, "ema_decay": 0.998,
        "crop_min": 0.35, "rand_augment": 0, "jitter": 0.2, "erase": 0.2, "mixup": 0.2,
        "mix_share": 1.0, "mix_until": 0.85, "repeats": 1, "drop_path": 0.1, "crop_pct": 1.0,
        "validate_every": 10, "precision": "auto",
    },
}  # fmt: skip
"""Recipes by name: what differs from the defaults."""

SOURCE_FIELDS: Mapping[str, Mapping[str, Any]] = {
    # 8 x 8 pixels, quickly learnt, and mirrored figures are other figures or none.
    "digits": {
        "epochs": 30, "warmup_epochs": 2.0, "ema_decay": 0.99, "size": 32, "crop_pct": 1.0,
        "crop_min": 0.7, "flip": 0.0, "rotate": 10.0, "shift": 0.1, "rand_augment": 0,
        "jitter": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "mix_share": 0.0,
        "label_smoothing": 0.05, "validate_every": 5, "precision": "fp32",
    },
}  # fmt: skip
"""What a built-in source of data asks for, over any preset."""


def get_preset(name: str, source: str = "") -> Recipe:
    """Return the recipe of a preset for a source of data, as given to `--data`.

    Raises: UsageError with the nearest name.
    """
    if name not in PRESETS:
        raise UsageError(unknown_name("preset", name, PRESETS))
    return Recipe().replace({**PRESETS[name], **SOURCE_FIELDS.get(source, {})})


def resolve_recipe(preset: str, source: str, given: Mapping[str, Any]) -> Recipe:
    """Return a preset's recipe with the fields `given` set over it.

    Where the number of epochs is given and the warm-up is not, the preset's is shortened to a
    tenth of a training that is short for it.
    Raises: UsageError.
    """
    recipe = get_preset(preset, source)
    epochs = given.get("epochs")
    if type(epochs) is int and "warmup_epochs" not in given:
        given = {**given, "warmup_epochs": min(recipe.warmup_epochs, epochs / 10)}
    return recipe.replace(given)


def read_recipe(path: Path) -> dict[str, Any]:
    """Return the fields that a recipe file sets.

    Raises: UsageError for a file that cannot be read, is no TOML or sets what is no field.
    """
    try:
        with path.open("rb") as file:
            text = file.read(MAX_RECIPE_BYTES + 1)
        if len(text) > MAX_RECIPE_BYTES:
            raise UsageError(f"{path}: larger than {MAX_RECIPE_BYTES} bytes, so no recipe.")
        fields = tomllib.loads(text.decode())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror}). Check the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not a recipe file ({error}). Write it as TOML.") from error
    for name, value in fields.items():
        try:
            _check(name, _widened(name, value), _knob_of(name))
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from error
    return fields


def _knob_of(name: str) -> Knob:
    if name not in KNOBS:
        raise UsageError(unknown_name("field of a recipe", name, KNOBS))
    return KNOBS[name]


def _widened(name: str, value: Any) -> Any:
    """Return a whole number given for a field of fractions as what the field holds."""
    return float(value) if _TYPES.get(name) is float and type(value) is int else value


def _check(name: str, value: Any, knob: Knob) -> None:
    kind, given = _TYPES[name], type(value)
    if given is not kind:
        raise UsageError(f"{name}: must be {_KINDS[kind]} (got {value!r:.60}). Mend the recipe.")
    if knob.choices and value not in knob.choices:
        raise UsageError(unknown_name(name, value, knob.choices))
    # Not-a-number is in no range.
    if kind in (int, float) and not knob.least <= value <= knob.most:
        raise UsageError(
            f"{name}: out of range (got {value!r:.60}, expected {knob.least:g} to {knob.most:g}). "
            "Choose another."
        )


_KINDS: Mapping[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
}


def _literal(value: Any) -> str:
    """Return a value as TOML writes it."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    return repr(value)
