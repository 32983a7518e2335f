"""The model repository: where models are found by name, and where they are written.

A name is sought in `--models DIR`, `$COAT_MODELS`, `./models`, then among the published configs.
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from coat_deploy.errors import SpecError, UsageError, unknown_name
from coat_deploy.model import CONFIG, Model
from coat_deploy.spec import ModelSpec

MODELS_VARIABLE = "COAT_MODELS"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Repository:
    """Folders in which models are sought by name, in order; the first takes what is written."""

    roots: tuple[Path, ...]

    @classmethod
    def open(cls, models: Path | None = None) -> "Repository":
        """Return the repository of `models`, $COAT_MODELS, ./models and the published configs."""
        variable = os.environ.get(MODELS_VARIABLE)
        roots = [models, Path(variable) if variable else None, Path("models")]
        unique = dict.fromkeys(root for root in roots if root is not None)
        return cls((*unique, published_configs()))

    @property
    def writable(self) -> Path:
        """The folder that new models are written to."""
        return self.roots[0]

    def find(self, name: str) -> Model:
        """Return the model `name`; with a slash in it, the folder.

        Raises: UsageError with the nearest name.
        """
        if "/" in name:
            folder = Path(name)
            if not _holds_model(folder):
                raise UsageError(f"{name}: no model folder (it holds no {CONFIG}). Check the path.")
            # A link keeps its own name; "." and ".." have none.
            return Model(folder if folder.name not in ("", "..") else folder.resolve())
        for root in self.roots:
            if _is_name(name) and _holds_model(root / name):
                return self._at(root, name)
        known = [model.name for model in self.models()]
        raise UsageError(f"{unknown_name('model', name, known)} Looked in: {self._places()}.")

    def _at(self, root: Path, name: str) -> Model:
        return Model(root / name, None if root == self.writable else self.writable)

    def _places(self) -> str:
        return ", ".join(str(root) for root in self.roots[:-1]) + ", the published configs"

    def models(self) -> Sequence[Model]:
        """Return every model by name; of one name the first found."""
        found: dict[str, Model] = {}
        for root in self.roots:
            for name in _names_in(root):
                if _is_name(name) and _holds_model(root / name):
                    found.setdefault(name, self._at(root, name))
        return [found[name] for name in sorted(found)]

    def home(self, model: Model) -> Model:
        """Return where `model` is to be written: its own folder, unless it is elsewhere's.

        A model found behind the first root is written to the first root, config included.
        """
        parent = model.folder.parent.resolve()
        inside = any(parent == root.resolve() for root in self.roots[1:])
        if parent == self.writable.resolve() or not inside:
            return model
        return Model(self.writable / model.name)

    def new(self, name: str) -> Model:
        """Return where a model called `name` is to be written. Raises UsageError."""
        if not _is_name(name) or "\0" in name:
            raise UsageError(
                f"model name '{name}': cannot be (expected a folder's name, without a slash, "
                "not hidden). Choose another, and its place with --models."
            )
        return Model(self.writable / name)


def _names_in(root: Path) -> list[str]:
    """Return what is in a root; nothing where it is absent or may not be read."""
    try:
        return os.listdir(root)
    except OSError as error:
        _log.info("%s: cannot be listed (%s)", root, error.strerror)
        return []


def _holds_model(folder: Path) -> bool:
    # Unlike Path.is_file it is False for what may not be read, or is no possible path.
    return os.path.isfile(folder / CONFIG)


def published_configs() -> Path:
    """Return the folder of the published configs, as installed or in a checkout."""
    installed = Path(__file__).with_name("published")
    # An editable install does not map models/ into the package.
    return installed if installed.is_dir() else Path(__file__).parents[1] / "models"


def read_labels(spec: ModelSpec) -> tuple[str, ...]:
    """Return one label a class: the config's, those of its label set, or "class 0", ...

    Raises: SpecError for a label set that is not known, or is of other classes.
    """
    if spec.label_names:
        return spec.label_names
    if spec.label_set is None or spec.num_classes == 0:
        return tuple(f"class {i}" for i in range(spec.num_classes))
    path = published_configs() / f"{spec.label_set}.txt"
    if not _is_name(spec.label_set) or not os.path.isfile(path):
        raise SpecError(f"label set '{spec.label_set}': not known. Write 'label_names' instead.")
    labels = tuple(path.read_text(encoding="utf-8").splitlines())
    if len(labels) != spec.num_classes:
        raise SpecError(
            f"label set '{spec.label_set}': of other classes (got {len(labels)}, expected "
            f"{spec.num_classes}). Write 'label_names' instead, or leave 'label_set' out."
        )
    return labels


def _is_name(name: str) -> bool:
    return bool(name) and not name.startswith(".") and Path(name).name == name
