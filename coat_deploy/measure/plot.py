"""A picture of a bench: one panel a batch, one bar a contender, fastest on top."""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from coat_deploy.errors import BackendMissing, UsageError
from coat_deploy.machine import Machine
from coat_deploy.measure.latency import Latency
from coat_deploy.spec import format_size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Metric = Literal["latency", "throughput"]

SUFFIXES = (".png", ".svg")

_INK, _MUTED, _GREY = "#1f2933", "#6b7785", "#b4bec9"
# Apart for any colour vision, after Okabe and Ito; targets take them in turn, baselines are grey.
_COLOURS = ("#3b7dd8", "#2a9d8f", "#e08e45", "#a05fb4", "#c94f6d")

# Inches: the picture grows with its bars, so that text and bars keep their size.
_WIDTH, _MARGIN = 8.6, 0.22
_HEAD, _HEADING, _BAR, _FOOT = 0.50, 0.52, 0.34, 0.86
_COLUMN, _LEAST_AXES = 1.95, 2.5
# Points from the axes to the right edges of the ratio and of its interval.
_RATIO_POINTS, _INTERVAL_POINTS = 42, 122
_ROOM = 1.14
"""Axis length as a share of the longest bar: leaves room for the figure at its end."""


def plot(
    results: Sequence[Latency],
    path: Path,
    *,
    machine: Machine,
    title: str = "",
    metric: Metric = "latency",
) -> None:
    """Draw `results` to a PNG or SVG, by the suffix of `path`; a file there is replaced whole.

    Bars are medians, whiskers their 95 % intervals; every panel has its own scale from 0.
    Raises: UsageError for another suffix or a path that cannot be written; BackendMissing
    without matplotlib.
    """
    assert results
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(
            f"{path}: not a kind of picture we draw (got '{path.suffix}', expected .png or .svg). "
            "Name it for example latency.png."
        )
    try:
        import matplotlib
    except ImportError:
        raise BackendMissing(
            'plot: package matplotlib is not installed. Run: pip install "coat-deploy[plot]".'
        ) from None
    style: dict[Any, Any] = {
        "font.family": "DejaVu Sans",  # comes with matplotlib
        "font.size": 9.5,
        "text.parse_math": False,  # a $ in a title is a $
        "svg.hashsalt": "coat-deploy",  # not random: the same figures give the same file
    }
    with matplotlib.rc_context(style):
        _save(_draw(results, machine, title, metric), path)


def _draw(results: Sequence[Latency], machine: Machine, title: str, metric: Metric) -> "Figure":
    # The figure alone, never pyplot: no global state, no window system.
    from matplotlib.figure import Figure

    panels = _panels(results)
    height = _HEAD + _FOOT + sum(_HEADING + _BAR * len(panel) for panel in panels)
    left = _MARGIN + 0.085 * max(len(result.name) for result in results)
    compared = any(result.ratio is not None for result in results)
    beyond = _COLUMN if compared else _MARGIN
    width = max(_WIDTH, left + _LEAST_AXES + beyond)
    right = width - beyond
    figure = Figure(figsize=(width, height), facecolor="white")
    colours = _target_colours(results)
    top = height - _HEAD
    for panel in panels:
        bars = _BAR * len(panel)
        bottom = top - _HEADING - bars
        box = (left / width, bottom / height, (right - left) / width, bars / height)
        _draw_panel(figure.add_axes(box), panel, colours, metric)
        top = bottom
    unit = "latency, ms a batch" if metric == "latency" else "throughput, images/s"
    heading = f"{title}: {unit}" if title else unit.capitalize()
    x, y = _MARGIN / width, 1 - 0.32 / height
    figure.text(x, y, heading, size=13, weight="bold", color=_INK, va="center")
    note = _note(machine, metric, compared)
    figure.text(x, 0.16 / height, note, size=7.5, color=_MUTED, va="bottom", linespacing=1.5)
    return figure


def _note(machine: Machine, metric: Metric, compared: bool) -> str:
    better = "shorter" if metric == "latency" else "longer"
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    ratios = " Ratio above 1: faster." if compared else ""
    return (
        f"Medians with 95 % intervals; {better} is better.{ratios}\n{machine.summary()}\n{versions}"
    )


def _panels(results: Sequence[Latency]) -> list[list[Latency]]:
    """Group what was compared, in the order of the results; fastest first within a group."""
    groups: dict[tuple[Any, ...], list[Latency]] = {}
    for result in results:
        groups.setdefault((result.batch, result.size, result.threads), []).append(result)
    return [sorted(group, key=lambda result: result.p50_ms) for group in groups.values()]


def _target_colours(results: Sequence[Latency]) -> dict[str, str]:
    targets = sorted({result.target for result in results})
    return {target: _COLOURS[i % len(_COLOURS)] for i, target in enumerate(targets)}


def _draw_panel(
    axes: "Axes", panel: Sequence[Latency], colours: dict[str, str], metric: Metric
) -> None:
    longest = max(_bar(result, metric)[2] for result in panel)
    for row, result in enumerate(panel):
        value, low, high = _bar(result, metric)
        colour = _GREY if result.name == result.baseline else colours[result.target]
        axes.barh(row, value, height=0.64, color=colour, linewidth=0)
        axes.hlines(row, low, high, color=_INK, linewidth=1)
        axes.vlines((low, high), row - 0.1, row + 0.1, color=_INK, linewidth=1)
        x = max(value, high) + 0.015 * longest
        axes.text(x, row, _digits(value), va="center_baseline", color=_INK, weight="bold")
        _write_ratio(axes, row, result)
    first = panel[0]
    threads = "" if first.threads is None else f"  ·  {_count(first.threads, 'thread')}"
    heading = f"batch {first.batch}  ·  {format_size(first.size)}{threads}"
    axes.set_title(heading, loc="left", size=9.5, color=_MUTED, pad=6)
    if first.baseline is not None:
        axes.annotate(
            f"against {first.baseline}", (1, 1), (_INTERVAL_POINTS, 6), ha="right", color=_MUTED,
            xycoords="axes fraction", textcoords="offset points",
        )  # fmt: skip
    axes.set_yticks(range(len(panel)), [result.name for result in panel], color=_INK)
    axes.set_ylim(len(panel) - 0.5, -0.5)
    axes.set_xlim(0, longest * _ROOM)
    axes.set_xticks([])
    axes.tick_params(length=0)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)
    axes.spines["left"].set_color(_GREY)


def _write_ratio(axes: "Axes", row: int, result: Latency) -> None:
    """Write ratio and interval in columns of their own, right of the axes."""
    if result.ratio is None or result.ratio_interval is None:
        return
    low, high = result.ratio_interval
    cells = [(_RATIO_POINTS, f"{result.ratio:.2f}×", _INK)]
    if result.name == result.baseline:
        cells.append((_INTERVAL_POINTS, "baseline", _MUTED))
    else:
        cells.append((_INTERVAL_POINTS, f"{low:.2f} to {high:.2f}", _MUTED))
    for points, text, colour in cells:
        axes.annotate(
            text, (1, row), (points, 0), ha="right", va="center_baseline", color=colour,
            xycoords=axes.get_yaxis_transform(), textcoords="offset points",
        )  # fmt: skip


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _bar(result: Latency, metric: Metric) -> tuple[float, float, float]:
    """Return value, low and high of a bar."""
    low, high = result.median_interval_ms
    if metric == "latency":
        return result.p50_ms, low, high
    batch_ms = result.batch * 1e3
    return batch_ms / result.p50_ms, batch_ms / high, batch_ms / low


def _digits(value: float) -> str:
    """Return three digits, more for large numbers: 0.0123, 4.56, 20.7, 301, 1234."""
    if value >= 99.95:
        return f"{value:.0f}"
    return f"{value:#.3g}".rstrip(".")


def _save(figure: "Figure", path: Path) -> None:
    kind = path.suffix.lower().removeprefix(".")
    metadata = {"Date": None} if kind == "svg" else None
    try:
        number, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    except OSError as error:
        raise _not_written(path, error) from None
    try:
        with os.fdopen(number, "wb") as stream:
            figure.savefig(stream, format=kind, dpi=200, metadata=metadata)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise _not_written(path, error) from None
        raise


def _not_written(path: Path, error: OSError) -> UsageError:
    return UsageError(
        f"{path}: the picture was not written ({error.strerror}). "
        "Choose a folder that exists and can be written."
    )
