"""How closely a candidate's outputs follow the reference's.

Every figure is computed in float64, image by image; only a row of scalars an image is kept.
Logits (B, K) have all figures; feature maps (B, C, h, w) have no classes, so their class figures
are None. Of several outputs the worst figure counts.

A value that is NaN or infinite makes every figure of its image NaN and its top-1 a disagreement,
and no bar (`bar.py`) ever lets it pass.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import RunnerError
from coat_deploy.runner import LOGITS, Array

FULL_SCALE = 20.0
"""Largest |output| for which an absolute limit is taken literally.

float32 keeps 24 bits: at 20, about the largest logit of an ImageNet classifier, one step is
1.9e-6 and 1e-4 is fifty of them. A feature map that reaches 1000 has steps of 6e-5, and no
exact kernel keeps 1e-4 there. Beyond `FULL_SCALE` an image's differences are divided by its
largest |reference| / FULL_SCALE, so that a limit stays the same number of steps.
"""

_Rows = npt.NDArray[np.void]
_Doubles = npt.NDArray[np.float64]
_FIGURES = (
    "max_abs", "scaled", "sum_abs", "square_difference", "square_reference", "cosine", "kl",
)  # fmt: skip
_COUNTS = ("values", "bad_reference", "bad_candidate")
_CLASS = ("same_top1", "top5", "margin")
_ROW = np.dtype([(name, np.float64) for name in (*_FIGURES, *_COUNTS, *_CLASS)])


@dataclass(frozen=True)
class Agreement:
    """Figures of a candidate against its reference over `images` comparisons.

    `max_abs_difference`, `mean_abs_difference`: of |candidate - reference|, over all values.
    `max_scaled_difference`: the same maximum with outputs above `FULL_SCALE` scaled down to it.
    `relative_l2`: |candidate - reference|_2 / |reference|_2 over all values.
    `centred_cosine`, `centred_cosine_min`: mean and minimum over images of the cosine of the
    outputs less their mean over the image's values; without the subtraction a common offset
    flatters it. Two constant outputs count as 1, a constant beside a varied one as 0.
    `kl_divergence`, `kl_divergence_max`: mean and maximum of KL(reference || candidate), nats.
    `top1_agreement`: share of images with the same first class. `flip_margins`: for each of the
    others the reference's own lead of its first class over its second, scaled like
    `max_scaled_difference`; infinite where a value is not finite.
    `top5_overlap`: mean share of the reference's first five classes among the candidate's.
    `non_finite_reference`, `non_finite_candidate`: values that are NaN or infinite.
    `worst_image`, `worst_index`: the image with the largest difference.
    """

    images: int
    max_abs_difference: float
    max_scaled_difference: float
    mean_abs_difference: float
    relative_l2: float
    centred_cosine: float
    centred_cosine_min: float
    kl_divergence: float | None
    kl_divergence_max: float | None
    top1_agreement: float | None
    flip_margins: tuple[float, ...]
    top5_overlap: float | None
    non_finite_reference: int
    non_finite_candidate: int
    worst_image: str
    worst_index: int

    @property
    def finite(self) -> bool:
        """Whether no value of either side is NaN or infinite."""
        return self.non_finite_reference == 0 and self.non_finite_candidate == 0

    def summary(self) -> str:
        """Return the main figures in one line."""
        parts = [
            f"max |delta| {self.max_abs_difference:.3g}",
            f"relative L2 {self.relative_l2:.3g}",
            f"centred cosine {self.centred_cosine:.6f}",
        ]
        if self.top1_agreement is not None:
            parts.append(f"top-1 agreement {self.top1_agreement:.2%}")
        if not self.finite:
            parts.append(
                f"NaN or Inf: {self.non_finite_reference} values of the reference, "
                f"{self.non_finite_candidate} of the candidate"
            )
        return ", ".join(parts)

    def to_json(self) -> dict[str, Any]:
        """Return the figures under stable keys; one that is NaN, infinite or absent is null."""
        document: dict[str, Any] = {"images": self.images}
        for name in (
            "max_abs_difference", "max_scaled_difference", "mean_abs_difference", "relative_l2",
            "centred_cosine", "centred_cosine_min", "kl_divergence", "kl_divergence_max",
            "top1_agreement", "top5_overlap",
        ):  # fmt: skip
            value = getattr(self, name)
            document[name] = value if value is not None and math.isfinite(value) else None
        document["top1_flips"] = len(self.flip_margins)
        document["non_finite"] = {
            "reference": self.non_finite_reference,
            "candidate": self.non_finite_candidate,
        }
        document["worst_image"] = {"name": self.worst_image, "index": self.worst_index}
        return document


class AgreementMeter:
    """Accumulates comparisons batch by batch; `agreement()` is the sum of them so far."""

    def __init__(self) -> None:
        self.images = 0
        self._rows: dict[str, list[_Rows]] = {}
        self._worst = (-1.0, "", -1)

    def add(
        self,
        reference: Mapping[str, Array],
        candidate: Mapping[str, Array],
        names: Sequence[str] | None = None,
    ) -> None:
        """Compare every output of `reference`, (B, ...), with the candidate's of that name.

        `names` holds a name an image; without it images are called by their index.
        Raises: RunnerError when the candidate lacks an output or returns another shape.
        """
        assert reference, "nothing to compare"
        rows = {name: _compare(name, value, candidate) for name, value in reference.items()}
        count = len(next(iter(rows.values())))
        assert names is None or len(names) == count, "one name an image"
        for name, value in rows.items():
            self._rows.setdefault(name, []).append(value)
        worst = np.max([value["max_abs"] for value in rows.values()], axis=0)
        worst = np.where(np.isnan(worst), np.inf, worst)
        place = int(worst.argmax())
        if worst[place] > self._worst[0]:
            index = self.images + place
            self._worst = (float(worst[place]), names[place] if names else str(index), index)
        self.images += count

    def agreement(self) -> Agreement:
        """Return the figures of everything added, of several outputs the worst."""
        assert self.images, "nothing was added"
        outputs = {name: np.concatenate(parts) for name, parts in self._rows.items()}
        figures = [_reduce(rows) for rows in outputs.values()]
        logits = outputs.get(LOGITS)
        flips = () if logits is None else logits["margin"][logits["same_top1"] == 0]
        return Agreement(
            images=self.images,
            **{key: float(np.max([f[key] for f in figures])) for key in _WORST_IS_MAX},
            **{key: float(np.min([f[key] for f in figures])) for key in _WORST_IS_MIN},
            kl_divergence=None if logits is None else float(logits["kl"].mean()),
            kl_divergence_max=None if logits is None else float(logits["kl"].max()),
            top1_agreement=None if logits is None else float(logits["same_top1"].mean()),
            flip_margins=tuple(sorted((float(margin) for margin in flips), reverse=True)),
            top5_overlap=None if logits is None else float(logits["top5"].mean()),
            non_finite_reference=sum(int(r["bad_reference"].sum()) for r in outputs.values()),
            non_finite_candidate=sum(int(r["bad_candidate"].sum()) for r in outputs.values()),
            worst_image=self._worst[1],
            worst_index=self._worst[2],
        )


_WORST_IS_MAX = (
    "max_abs_difference", "max_scaled_difference", "mean_abs_difference", "relative_l2",
)  # fmt: skip
_WORST_IS_MIN = ("centred_cosine", "centred_cosine_min")


def _reduce(rows: _Rows) -> dict[str, float]:
    """Reduce the rows of one output; NaN in any row stays."""
    return {
        "max_abs_difference": float(rows["max_abs"].max()),
        "max_scaled_difference": float(rows["scaled"].max()),
        "mean_abs_difference": float(rows["sum_abs"].sum() / rows["values"].sum()),
        "relative_l2": relative(
            float(rows["square_difference"].sum()), float(rows["square_reference"].sum())
        ),
        "centred_cosine": float(rows["cosine"].mean()),
        "centred_cosine_min": float(rows["cosine"].min()),
    }


def relative(square_difference: float, square_reference: float) -> float:
    """Return the ratio of two norms given squared: 0 for 0 / 0, infinite for any other / 0."""
    if square_reference == 0:
        return 0.0 if square_difference == 0 else square_difference * math.inf
    return math.sqrt(square_difference / square_reference)


def _compare(name: str, value: Array, candidate: Mapping[str, Array]) -> _Rows:
    """Return a row an image for one output."""
    if name not in candidate:
        raise RunnerError(
            f"output '{name}': the candidate does not return it "
            f"(got {', '.join(candidate) or 'nothing'}). Export the model again."
        )
    other = candidate[name]
    if other.shape != value.shape:
        raise RunnerError(
            f"output '{name}': the candidate returns another shape (got {list(other.shape)}, "
            f"expected {list(value.shape)}). Export the model again."
        )
    assert value.size, "an empty batch"
    r = value.reshape(len(value), -1).astype(np.float64)
    c = other.reshape(len(other), -1).astype(np.float64)
    rows = np.zeros(len(r), dtype=_ROW)
    rows["values"] = r.shape[1]
    rows["bad_reference"] = (~np.isfinite(r)).sum(axis=1)
    rows["bad_candidate"] = (~np.isfinite(c)).sum(axis=1)
    for figure in _FIGURES:
        rows[figure] = np.nan
    rows["margin"] = np.inf
    good = (rows["bad_reference"] == 0) & (rows["bad_candidate"] == 0)
    if good.any():
        filled = rows[good]
        _fill_values(filled, r[good], c[good])
        if name == LOGITS:
            _fill_classes(filled, r[good], c[good])
        rows[good] = filled
    return rows


def _fill_values(rows: _Rows, r: _Doubles, c: _Doubles) -> None:
    """Fill the figures that need no classes; r, c (B, K) finite."""
    delta = np.abs(c - r)
    rows["max_abs"] = delta.max(axis=1)
    rows["scaled"] = rows["max_abs"] / _scale(r)
    rows["sum_abs"] = delta.sum(axis=1)
    rows["square_difference"] = (delta * delta).sum(axis=1)
    rows["square_reference"] = (r * r).sum(axis=1)
    rows["cosine"] = _centred_cosine(r, c)


def _scale(r: _Doubles) -> _Doubles:
    scale: _Doubles = np.maximum(1.0, np.abs(r).max(axis=1) / FULL_SCALE)
    return scale


def _centred_cosine(r: _Doubles, c: _Doubles) -> _Doubles:
    """Return the cosine of r and c, (B, K), less their means; see `Agreement` for constants."""
    norms, centred = [], []
    for x in (r, c):
        y = x - x.mean(axis=1, keepdims=True)
        norm = np.linalg.norm(y, axis=1)
        # What is left of a constant row is the rounding of its mean: that has no direction.
        norms.append(np.where(norm <= 1e-12 * np.linalg.norm(x, axis=1), 0.0, norm))
        centred.append(y)
    product = norms[0] * norms[1]
    dot = (centred[0] * centred[1]).sum(axis=1)
    cosine = np.clip(dot / np.where(product == 0, 1.0, product), -1.0, 1.0)
    both_constant = (norms[0] == 0) & (norms[1] == 0)
    result: _Doubles = np.where(product == 0, np.where(both_constant, 1.0, 0.0), cosine)
    return result


def _fill_classes(rows: _Rows, r: _Doubles, c: _Doubles) -> None:
    """Fill what compares classes; r, c (B, K) finite logits."""
    log_p, log_q = _log_softmax(r), _log_softmax(c)
    # Never negative but for rounding.
    rows["kl"] = np.maximum(0.0, (np.exp(log_p) * (log_p - log_q)).sum(axis=1))
    first = min(5, r.shape[1])
    top_r = np.argsort(-r, axis=1, kind="stable")[:, :first]
    top_c = np.argsort(-c, axis=1, kind="stable")[:, :first]
    rows["same_top1"] = top_r[:, 0] == top_c[:, 0]
    rows["top5"] = (top_r[:, :, None] == top_c[:, None, :]).any(axis=2).mean(axis=1)
    if first > 1:
        lead = np.take_along_axis(r, top_r[:, :2], axis=1)
        rows["margin"] = (lead[:, 0] - lead[:, 1]) / _scale(r)


def _log_softmax(x: _Doubles) -> _Doubles:
    y = x - x.max(axis=1, keepdims=True)
    result: _Doubles = y - np.log(np.exp(y).sum(axis=1, keepdims=True))
    return result
