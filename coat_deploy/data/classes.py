"""Which classes there are, in which order, and whether every split has them."""

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image

from coat_deploy.data.dataset import Dataset
from coat_deploy.errors import UsageError

_SHOWN = 5

Value = int | str
"""What stands for a class in a source: the name of a folder, or what is in a column."""


@dataclass(frozen=True)
class Classes:
    """The names of classes in order, and the class of each value that stands for one.

    `spelled` is the name of every value that the source knows, of those too that are no class.
    """

    names: tuple[str, ...]
    index: Mapping[Value, int]
    spelled: Mapping[Value, str]

    @classmethod
    def of(cls, spelled: Mapping[Value, str], wanted: Sequence[str] = ()) -> "Classes":
        """Return the classes of values in their order, or those of `wanted` by name."""
        if not wanted:
            return cls(tuple(spelled.values()), {v: i for i, v in enumerate(spelled)}, spelled)
        counts = Counter(wanted)
        known = {name: i for i, name in enumerate(wanted) if counts[name] == 1}
        index = {value: known[name] for value, name in spelled.items() if name in known}
        return cls(tuple(wanted), index, spelled)

    def find(self, value: Value, subject: str) -> int:
        """Return the class of a value; `subject` names its source in errors.

        Raises: UsageError for a value that is none, with the nearest label.
        """
        if (found := self.index.get(value)) is not None:
            return found
        name = self.spelled.get(value, str(value))
        if name in self.names:
            raise UsageError(
                f"{subject}: class '{name}' is several of the {len(self.names)} labels. "
                "Give every label a name of its own."
            )
        nearest = difflib.get_close_matches(name, self.names, n=1)
        hint = f" Did you mean '{nearest[0]}'?" if nearest else ""
        raise UsageError(
            f"{subject}: class '{name}' is none of the {len(self.names)} labels "
            f"(expected {some(self.names)}).{hint}"
        )


@dataclass(frozen=True, eq=False)
class Relabelled:
    """A dataset with the classes of a model: see `relabel`."""

    whole: Dataset
    label_names: tuple[str, ...]
    labels: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def name(self, index: int) -> str:
        """Return what stands for the image in messages."""
        return self.whole.name(index)

    def image(self, index: int) -> Image.Image:
        """Return the image as upright 8-bit RGB. Raises: ImageError."""
        return self.whole.image(index)


def relabel(dataset: Dataset, names: tuple[str, ...], subject: str) -> Dataset:
    """Return a dataset with the classes `names`, in this order; each image's is found by name.

    Raises: UsageError for an image of another class, with the nearest name.
    """
    if not names or names == dataset.label_names:
        return dataset
    classes = Classes.of(dict(enumerate(dataset.label_names)), names)
    used, places = np.unique(dataset.labels, return_inverse=True)
    found = np.array([classes.find(int(label), subject) for label in used], dtype=np.int64)
    return Relabelled(dataset, names, found[places])


def check_to_train(train: Dataset, validation: Dataset, subject: str) -> None:
    """Check that a network can learn from one split and be measured on the other.

    Raises: UsageError for a single class, for a class of which one split has images and the
        other none, and for one that is empty in both.
    """
    if len(train.label_names) < 2:
        raise UsageError(
            f"{subject}: only one class, {some(train.label_names)} (expected at least 2). "
            "Give images of what it is to be told from, too."
        )
    check_same_names(train.label_names, validation.label_names, subject)
    used = [_used(split) for split in (train, validation)]
    if empty := [name for name in train.label_names if name not in used[0] | used[1]]:
        raise UsageError(
            f"{subject}: no image of {_classes(empty)}. Add images, or take it off the classes."
        )
    check_same_names(used[0], used[1], subject)


def check_same_names(train: Iterable[str], validation: Iterable[str], subject: str) -> None:
    """Check that two splits have the same classes. Raises UsageError naming those of one only."""
    both = set(train), set(validation)
    only = sorted(both[0] - both[1]), sorted(both[1] - both[0])
    splits = zip(only, ("train", "validation"), strict=True)
    told = [f"{_classes(names)} only in {split}" for names, split in splits if names]
    if told:
        raise UsageError(
            f"{subject}: the splits have different classes ({'; '.join(told)}). "
            "Give both images of every class."
        )


def some(names: Sequence[str]) -> str:
    """Return the first few names for a message, and how many more there are."""
    rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(f"'{name}'" for name in names[:_SHOWN]) + rest


def _classes(names: Sequence[str]) -> str:
    return f"class {some(names)}" if len(names) == 1 else f"classes {some(names)}"


def _used(split: Dataset) -> set[str]:
    counts = np.bincount(split.labels, minlength=len(split.label_names))
    return {split.label_names[i] for i in np.flatnonzero(counts)}
