"""Pictures of a training: its curves over the epochs, and what is taken for what at its end."""

import contextlib
import io
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from coat_deploy.errors import BackendMissing, UsageError
from coat_deploy.train.markdown import printable
from coat_deploy.train.progress import EpochReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

_INK, _MUTED, _GREY = "#1f2933", "#6b7785", "#b4bec9"
# Apart for any colour vision, after Okabe and Ito.
_TRAINING, _VALIDATION, _RATE = "#3b7dd8", "#e08e45", "#2a9d8f"
_SHADES = ("#ffffff", "#8ab4ea", "#3b7dd8", "#12325f")

_FONT_SIZE = 9.5
_OTHER_SCRIPTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "WenQuanYi Zen Hei", "Droid Sans Fallback",
    "Noto Sans Arabic", "Noto Sans Devanagari", "Arial Unicode MS", "Hiragino Sans",
)  # fmt: skip
"""Fonts for what DejaVu Sans has no glyphs of; those that are installed are used."""

_MOST_MARKERS = 60
"""Evaluated epochs up to which each has a dot."""
_MOST_NAMED, _MOST_COUNTED = 100, 30
"""Classes up to which a confusion matrix names them, and up to which it has figures."""
_LONGEST_NAME = 28
_POINTS_AN_INCH = 72
_GLYPH = 0.64
"""Mean width of a glyph, in font sizes."""


def draw_history(reports: Sequence[EpochReport], suffix: str, title: str = "") -> bytes:
    """Return a picture of loss, top-1 and learning rate over the epochs, a ".png" or ".svg".

    Raises: UsageError for another suffix, BackendMissing without matplotlib.
    """
    _check(suffix)
    return _rendered(history_figure(reports, title), suffix)


def draw_confusion(
    confusion: npt.NDArray[np.int64], labels: Sequence[str], suffix: str, title: str = ""
) -> bytes:
    """Return a picture of a confusion matrix, a ".png" or ".svg"; see `confusion_figure`.

    Raises: UsageError for another suffix, BackendMissing without matplotlib.
    """
    _check(suffix)
    return _rendered(confusion_figure(confusion, labels, title), suffix)


def history_figure(reports: Sequence[EpochReport], title: str = "") -> "Figure":
    """Return loss, top-1 (if it was measured) and learning rate, one above the other.

    Raises: BackendMissing without matplotlib.
    """
    assert reports
    with _style():
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator

        evaluated = [report for report in reports if report.top1 is not None]
        heights = [3, 3, 1.6] if evaluated else [3, 1.6]
        figure = Figure(figsize=(8.6, 1.1 * sum(heights)), facecolor="white", layout="constrained")
        panels = list(figure.subplots(len(heights), sharex=True, height_ratios=heights))
        _draw_loss(panels[0], reports, evaluated)
        if evaluated:
            _draw_top1(panels[1], evaluated)
        _draw_rate(panels[-1], reports)
        panels[-1].set_xlabel("epoch", color=_MUTED)
        panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        panels[-1].set_xlim(0, 1.02 * reports[-1].epoch)
        if title:
            figure.suptitle(
                _shown(title, 80), x=0.01, ha="left", size=13, weight="bold", color=_INK
            )
        return figure


def confusion_figure(
    confusion: npt.NDArray[np.int64], labels: Sequence[str], title: str = ""
) -> "Figure":
    """Return a matrix: rows are the true classes, columns what they were taken for.

    `confusion` (K, K) counts images. The shade of a cell is its share of the row's images, a row
    without any is grey; up to 30 classes the counts are written too, up to 100 all have names.
    Raises: BackendMissing without matplotlib.
    """
    classes = len(labels)
    assert confusion.shape == (classes, classes) and classes > 0
    with _style():
        from matplotlib.colors import LinearSegmentedColormap, PowerNorm
        from matplotlib.figure import Figure

        cell = min(0.9, max(0.17, 6 / classes)) if classes <= _MOST_NAMED else 17 / classes
        side = cell * classes
        figure = Figure(figsize=(side, side), facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        totals = confusion.sum(axis=1, keepdims=True)
        shares = np.ma.masked_array(
            confusion / np.maximum(totals, 1), np.repeat(totals == 0, classes, 1)
        )
        shades = LinearSegmentedColormap.from_list("shares", _SHADES).with_extremes(bad="#e8ebee")
        # The root of a share: a confusion of a few per cent is to be seen.
        image = axes.imshow(shares, cmap=shades, norm=PowerNorm(0.5, 0, 1), aspect="equal")
        if named := classes <= _MOST_NAMED:
            _name_classes(axes, labels, totals.ravel().tolist(), cell)
        if classes <= _MOST_COUNTED:
            _write_counts(axes, confusion, shares, cell)
        bar = axes.inset_axes((1 + 0.2 / side, 0, 0.14 / side, min(1, 2.4 / side)))
        figure.colorbar(image, cax=bar, ticks=(0, 0.05, 0.25, 0.5, 1), format="{x:.0%}")
        bar.tick_params(length=2, labelsize=8, labelcolor=_MUTED)
        bar.set_title("share of row", size=8, color=_MUTED, loc="left")
        for spine in (*axes.spines.values(), *bar.spines.values()):
            spine.set_color(_GREY)
        axes.set_ylabel(
            "true class, and its images" if named else "true class, by number", color=_MUTED
        )
        axes.set_xlabel("taken for", color=_MUTED)
        heading = f"{_shown(title, 80)}: confusion" if title else "Confusion"
        axes.set_title(heading, loc="left", size=13, weight="bold", color=_INK, pad=24)
        return figure


def _draw_loss(
    axes: "Axes", reports: Sequence[EpochReport], evaluated: Sequence[EpochReport]
) -> None:
    _heading(axes, "loss; in training of augmented images and, where it has them, mixed labels")
    _line(axes, reports, [r.loss for r in reports], _TRAINING, "training")
    measured = [r for r in evaluated if r.validation_loss is not None]
    if measured:
        losses = [r.validation_loss for r in measured]
        _line(axes, measured, losses, _VALIDATION, "validation")
    axes.legend(frameon=False, labelcolor=_INK)


def _draw_top1(axes: "Axes", evaluated: Sequence[EpochReport]) -> None:
    from matplotlib.ticker import PercentFormatter

    shares = [report.top1 or 0.0 for report in evaluated]
    best = max(shares)
    epoch = evaluated[shares.index(best)].epoch
    beside = f", {best:.1%} at best (epoch {epoch})" if best > shares[-1] else ", its best"
    _heading(axes, f"validation top-1: {shares[-1]:.1%} at the end{beside}")
    _line(axes, evaluated, shares, _VALIDATION, "validation")
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))


def _draw_rate(axes: "Axes", reports: Sequence[EpochReport]) -> None:
    _heading(axes, "learning rate")
    _line(axes, reports, [report.learning_rate for report in reports], _RATE, "learning rate")
    axes.set_ylim(bottom=0)


def _line(
    axes: "Axes", reports: Sequence[EpochReport], values: Sequence[Any], colour: str, label: str
) -> None:
    marker = "o" if len(reports) <= _MOST_MARKERS else ""
    epochs = [report.epoch for report in reports]
    axes.plot(epochs, values, color=colour, label=label, linewidth=1.6, marker=marker, markersize=3)


def _heading(axes: "Axes", text: str) -> None:
    axes.set_title(text, loc="left", size=_FONT_SIZE, color=_MUTED)
    axes.grid(axis="y", color="#e8ebee", linewidth=0.8)
    axes.tick_params(length=0, labelcolor=_MUTED)
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(_GREY)


def _name_classes(axes: "Axes", labels: Sequence[str], totals: Sequence[int], cell: float) -> None:
    size = min(_FONT_SIZE, 0.8 * cell * _POINTS_AN_INCH)
    names = [_shown(label, _LONGEST_NAME) for label in labels]
    widest = max(map(len, names)) * _GLYPH * size / _POINTS_AN_INCH
    places = range(len(names))
    rows = [f"{name}  {total}" for name, total in zip(names, totals, strict=True)]
    axes.set_yticks(places, rows, size=size, color=_INK)
    axes.set_xticks(places, names, size=size, color=_INK, rotation=90 if widest > cell else 0)
    axes.tick_params(length=0)


def _write_counts(
    axes: "Axes", confusion: npt.NDArray[np.int64], shares: npt.NDArray[np.float64], cell: float
) -> None:
    """Write the counts that are not 0, as large as the longest of them allows."""
    digits = len(str(confusion.max()))
    size = min(_FONT_SIZE, 0.88 * cell * _POINTS_AN_INCH / (_GLYPH * digits))
    for row, column in np.argwhere(confusion > 0).tolist():
        colour = "white" if shares[row, column] > 0.3 else _INK
        axes.text(
            column, row, str(confusion[row, column]), size=size, color=colour, ha="center",
            va="center_baseline",
        )  # fmt: skip


def _shown(text: str, longest: int) -> str:
    text = printable(text)
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def _check(suffix: str) -> None:
    if suffix not in SUFFIXES:
        raise UsageError(
            f"picture: not a kind that is drawn (got '{suffix}', expected .png or .svg). "
            "Name it for example history.png."
        )


@contextlib.contextmanager
def _style() -> Iterator[None]:
    """Set how figures look, while one is made or rendered. Raises BackendMissing."""
    try:
        import matplotlib
        from matplotlib import font_manager
    except ImportError:
        raise BackendMissing(
            'plot: package matplotlib is not installed. Run: pip install "coat-deploy[plot]".'
        ) from None
    installed = set(font_manager.get_font_names())
    style: dict[Any, Any] = {
        # DejaVu Sans comes with matplotlib.
        "font.family": ["DejaVu Sans", *(n for n in _OTHER_SCRIPTS if n in installed)],
        "font.size": _FONT_SIZE,
        "text.parse_math": False,  # a $ in a name is a $
        "svg.fonttype": "none",  # text stays text: to be searched, and in any script
        "svg.hashsalt": "coat-deploy",  # not random: the same figures give the same file
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # A script that no font here has: boxes in a PNG, the reader's fonts in an SVG.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from")
        warnings.filterwarnings("ignore", message="Matplotlib currently does not support")
        yield


def _rendered(figure: "Figure", suffix: str) -> bytes:
    content = io.BytesIO()
    metadata = {"Date": None} if suffix == ".svg" else None
    with _style():
        figure.savefig(
            content, format=suffix[1:], dpi=160, metadata=metadata, bbox_inches="tight",
            pad_inches=0.15,
        )  # fmt: skip
    return content.getvalue()
