"""How good a network is, as text: the headline, the classes worst first, what is confused."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from coat_deploy.cli.tables import format_share, render_table

if TYPE_CHECKING:
    from coat_deploy.measure.accuracy import Share
    from coat_deploy.measure.quality import Quality

MAX_CLASSES, MAX_CONFUSIONS = 20, 3


def render_quality(subject: str, quality: "Quality", labels: Sequence[str]) -> str:
    """Return the report; `labels` name the classes."""
    parts = [headline(subject, quality), _classes(quality, labels), _confusions(quality, labels)]
    return "\n".join(part for part in parts if part)


def headline(subject: str, quality: "Quality") -> str:
    """Return top-1 and top-5, below their intervals, and how sure the network is of itself."""
    top1, top5, count = quality.top1, quality.top5, min(5, len(quality.per_class))
    lines = [
        f"{subject} on {_images(quality.images)}: top-1 {format_share(top1.value)}, "
        f"top-{count} {format_share(top5.value)}.",
        f"95% intervals: {_interval(top1)}, {_interval(top5)}.",
    ]
    if quality.nll is not None:
        lines.append(
            f"Mean confidence {quality.mean_confidence:.2%}, calibration error "
            f"{quality.calibration_error:.2%}, neg. log-likelihood {quality.nll:.3f}."
        )
    if quality.non_finite:
        lines.append(f"{_images(quality.non_finite)} had NaN or infinite logits: counted as wrong.")
    return "".join(f"{line}\n" for line in lines)


def _images(count: int) -> str:
    return f"{count} image{'' if count == 1 else 's'}"


def _interval(share: "Share") -> str:
    return f"{share.low:.1%} to {share.high:.1%}"


def _classes(quality: "Quality", labels: Sequence[str]) -> str:
    predicted = quality.confusion.sum(axis=0).tolist()
    found = [
        (share, label, count)
        for share, label, count in zip(quality.per_class, labels, predicted, strict=True)
        if share is not None
    ]
    found.sort(key=lambda row: (row[0].value, -row[0].total))
    rows = [
        (label, share.total, share.correct, count, format_share(share.value), _interval(share))
        for share, label, count in found[:MAX_CLASSES]
    ]
    columns = ("class", "images", "right", "predicted", "accuracy", "95% interval")
    text = render_table(columns, rows)
    rest = [share for share, *_ in found[MAX_CLASSES:]]
    if rest:
        right, total = sum(s.correct for s in rest), sum(s.total for s in rest)
        text += (
            f"and {len(rest)} more: {right} of {_images(total)} right "
            f"({format_share(right / total)})\n"
        )
    absent = len(labels) - len(found)
    if absent:
        text += f"{absent} of the model's {len(labels)} classes had no image.\n"
    return text


def _confusions(quality: "Quality", labels: Sequence[str]) -> str:
    rows = [
        (f"{labels[found.label]} taken for {labels[found.predicted]}", found.images)
        for found in quality.most_confused(MAX_CONFUSIONS)
    ]
    return render_table(("most confused", "images"), rows) if rows else ""
