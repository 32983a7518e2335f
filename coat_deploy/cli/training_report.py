"""What a finished training tells: accuracy, the hardest classes, what is confused, time."""

from collections.abc import Mapping
from typing import Any

from coat_deploy.cli.tables import render_table

MAX_CLASSES, MAX_CONFUSIONS = 10, 3


def render_training(report: Mapping[str, Any]) -> str:
    """Return the metrics of a training (`metrics.json`) as text."""
    low, high = report["top1_interval"]
    lines = [
        f"{report['model']}: top-1 {report['top1']:.1%} (95%: {low:.1%} to {high:.1%}), top-5 "
        f"{report['top5']:.1%} on {report['images']} validation images.",
        _pace(report),
        f"Written to {report['folder']}",
    ]
    parts = ["".join(f"{line}\n" for line in lines), _classes(report), _confusions(report)]
    return "\n".join(part for part in parts if part)


def _pace(report: Mapping[str, Any]) -> str:
    took = f"{report['epochs']} epochs in {report['seconds'] / 60:.1f} min"
    if report["images_per_s"] is None:
        return f"{took}."
    return (
        f"{took}, {report['images_per_s']:.0f} images/s; data {report['data_share']:.0%} of a "
        f"step, checkpoints {report['checkpoint_share']:.1%} of the time."
    )


def _classes(report: Mapping[str, Any]) -> str:
    found = [(name, row) for name, row in report["per_class"].items() if row["images"]]
    found.sort(key=lambda item: (item[1]["accuracy"], -item[1]["images"]))
    rows = [
        (name, row["images"], row["correct"], f"{row['accuracy']:.1%}")
        for name, row in found[:MAX_CLASSES]
    ]
    text = render_table(("class", "images", "right", "accuracy"), rows)
    more = len(found) - len(rows)
    return text + (f"and {more} more, better ones; all are in metrics.json\n" if more else "")


def _confusions(report: Mapping[str, Any]) -> str:
    labels = report["labels"]
    pairs = [
        (images, f"{labels[label]} taken for {labels[predicted]}")
        for label, row in enumerate(report["confusion"])
        for predicted, images in enumerate(row)
        if images and predicted != label
    ]
    pairs.sort(key=lambda pair: -pair[0])
    rows = [(text, images) for images, text in pairs[:MAX_CONFUSIONS]]
    return render_table(("most confused", "images"), rows) if rows else ""
