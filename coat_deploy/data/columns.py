"""Which columns of a table hold the images and the labels, and what the labels stand for.

Columns are told by the types that `datasets` gives them (`Image`, `ClassLabel`, `Value`), and
those by name, so that this file does without the library.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from coat_deploy.data.classes import Classes, Value, some
from coat_deploy.errors import UsageError, unknown_name

Features = Mapping[str, Any]
"""Type of each column."""

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp")
_LABEL_NAMES = ("label", "labels", "cls", "class", "target", "category")
"""What columns are usually called, where several are of a type that would do."""


def find_image_column(features: Features, named: str | None, subject: str) -> str:
    """Return the column of images: of type `Image`, else encoded bytes.

    Raises: UsageError where there is none, several, or none called `named`.
    """
    tiers = [_of_kind(features, kind) for kind in ("Image", "bytes in a struct", "bytes")]
    return _choose("image", named, tiers, _IMAGE_NAMES, features, subject)


def find_label_column(features: Features, named: str | None, subject: str) -> str:
    """Return the column of labels: of type `ClassLabel`, else integers or texts.

    Raises: UsageError where there is none, several, or none called `named`.
    """
    plain = [*_of_kind(features, "integers"), *_of_kind(features, "texts")]
    # WebDataset's own columns, __key__ and __url__, are texts too.
    tiers = [_of_kind(features, "ClassLabel"), [n for n in plain if not n.startswith("__")]]
    return _choose("label", named, tiers, _LABEL_NAMES, features, subject)


def spell(feature: Any, values: Iterable[Any], wanted: Sequence[str] = ()) -> dict[Value, str]:
    """Return the name of each label in a column that holds `values`, in the order of classes.

    The names of a `ClassLabel`; else the values in order, as texts. Integers that are no names
    in `wanted`, if that is given, are places in it. Nothing and negative integers are no labels.
    """
    if _kind(feature) == "ClassLabel":
        return dict(enumerate(feature.names))
    known = sorted(v for v in set(values) if v is not None and not (isinstance(v, int) and v < 0))
    if wanted and _kind(feature) == "integers" and not {str(v) for v in known} <= set(wanted):
        return dict(enumerate(wanted))
    return {value: str(value) for value in known}


def classify(values: Sequence[Any], classes: Classes, subject: str) -> npt.NDArray[np.int64]:
    """Return the class of each value in a column, (N,).

    Raises: UsageError for an empty column, and for values that stand for no class.
    """
    if not values:
        raise UsageError(f"{subject}: no images (0 rows). Give another source.")
    labels = np.array([classes.index.get(value, -1) for value in values], dtype=np.int64)
    if missing := np.flatnonzero(labels < 0).tolist():
        raise UsageError(
            f"{subject}: {len(missing)} of {len(values)} images have no label (row {missing[0]} "
            f"holds {values[missing[0]]!r}). Label them, or choose another split."
        )
    return labels


def _choose(
    what: str,
    named: str | None,
    tiers: Sequence[Sequence[str]],
    usual: Sequence[str],
    features: Features,
    subject: str,
) -> str:
    """Return `named`, or the one column of the first tier that has any."""
    if named is not None:
        if named not in features:
            raise UsageError(f"{subject}: {unknown_name('column', named, features)}")
        if not any(named in tier for tier in tiers):
            raise UsageError(f"{subject}: column '{named}' holds no {what}s. {_name_one(what)}")
        return named
    found = next(filter(None, tiers), ())
    if not found:
        columns = some(list(features))
        raise UsageError(
            f"{subject}: no column holds {what}s (got columns {columns}). {_name_one(what)}"
        )
    likely = [name for name in usual if name in found] or found
    if len(found) > 1 and likely is found:
        raise UsageError(
            f"{subject}: several columns may hold the {what}s (got {some(found)}). "
            f"{_name_one(what)}"
        )
    return likely[0]


def _name_one(what: str) -> str:
    return f"Name it with --{what}-column."


def _of_kind(features: Features, kind: str) -> list[str]:
    return [name for name, feature in features.items() if _kind(feature) == kind]


def _kind(feature: Any) -> str:
    if isinstance(feature, Mapping):
        return "bytes in a struct" if "bytes" in feature else "struct"
    dtype = str(getattr(feature, "dtype", ""))
    if type(feature).__name__ != "Value":
        return type(feature).__name__
    if dtype.endswith("binary"):
        return "bytes"
    if dtype.startswith(("int", "uint")):
        return "integers"
    return "texts" if "string" in dtype else dtype
