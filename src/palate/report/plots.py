"""Draw curves, intervals and bars as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.optimize import isotonic_regression

from palate.report import svg
from palate.report.curves import Line, Panel
from palate.report.words import count, number, percent, ticks

WIDTH, HEIGHT = 360.0, 208.0
"""Size of a plot in points. The width fits a phone, so that text keeps its size there."""
MOST_POINTS = 400
"""Most points of a curve; longer curves are drawn as means over blocks of equal size."""
SMOOTH_FROM, WINDOW = 60, 11
"""Fewest points for smoothing: the curve is drawn thin, with a bold moving average over WINDOW points."""
MARKED = 40
"""Most points for which each point has a marker."""
LETTER, LABEL = 5.8, 10.5
"""Width of a label's letter and height of a label's line, in points."""
LONGEST_LABEL = 14
"""Most letters of a label at the end of a line; longer labels are truncated."""

DASHES = ("-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2)), (0, (8, 2, 2, 2, 2, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "////", "----", "xxxx", "\\\\\\\\")

RC: Any = {
    "text.parse_math": False,
    "font.size": 10.0,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "path.simplify": True,
}


@dataclass(frozen=True)
class Interval:
    """A rate with its 95 % interval; all in [0, 1]."""

    label: str
    rate: float
    low: float
    high: float
    style: int = 0


def curves(panel: Panel) -> Markup:
    """Return a panel as SVG."""
    lines = [_thinned(line) for line in panel.lines]
    # Next to held-out points, a curve has no markers: they would look like held-out points.
    marked = len(lines) > 1 and not any(line.measured for line in lines)
    texts = [line.label[:LONGEST_LABEL] for line in lines]
    room = max((len(text) for text in texts), default=0) * LETTER
    with framed(HEIGHT, left=44, right=10 + room, top=16, bottom=30) as axes:
        for line in lines:
            _line(axes, line, marked=marked)
        if panel.guide is not None:
            axes.axhline(panel.guide, color=svg.MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        _scales(axes, panel)
        _end_labels(axes, lines)
        return svg.inline(axes.figure, panel.key, panel.title, describe(panel), dict(enumerate(texts)))


def describe(panel: Panel) -> str:
    """Return a text version of a panel for screen readers: first, last, lowest and highest values."""
    parts = []
    show = percent if panel.rate else number
    for line in panel.lines:
        steps, values = line.points
        name = f"{line.label}: " if line.label else ""
        if len(values) == 1:
            parts.append(f"{name}{show(values[0])} at step {count(steps[0])}")
            continue
        parts.append(
            f"{name}from {show(values[0])} at step {count(steps[0])} to {show(values[-1])} at step "
            f"{count(steps[-1])}, lowest {show(min(values))}, highest {show(max(values))}"
        )
    return f"{panel.title}. {'; '.join(parts)}."


def intervals(rows: Sequence[Interval], key: str, title: str) -> Markup:
    """Draw rates with their intervals, one below the other, with a guide line at one half."""
    room = max(len(row.label) for row in rows) * LETTER
    with framed(46 + 24 * len(rows), left=12 + room, right=46, top=10, bottom=32) as axes:
        axes.axvline(0.5, color=svg.MUTED, linewidth=0.8, dashes=(2, 2), zorder=1)
        for i, row in enumerate(rows):
            colour = svg.series(row.style)
            axes.plot([row.low, row.high], [i, i], color=colour, linewidth=2.2, solid_capstyle="butt")
            for bound in (row.low, row.high):
                axes.plot([bound, bound], [i - 0.16, i + 0.16], color=colour, linewidth=1.4)
            marker = MARKERS[row.style % len(MARKERS)]
            axes.plot([row.rate], [i], marker=marker, markersize=6.5, color=colour, linestyle="none")
            axes.text(1.03, i, percent(row.rate), color=svg.INK, va="center", clip_on=False)
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_yticks(range(len(rows)), labels=[f"@{i}@" for i in range(len(rows))])
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.25, 0.5, 0.75, 1], labels=["0 %", "25 %", "50 %", "75 %", "100 %"])
        axes.grid(visible=False, axis="y")
        described = "; ".join(
            f"{r.label}: {percent(r.rate)}, interval from {percent(r.low)} to {percent(r.high)}" for r in rows
        )
        texts = {i: row.label for i, row in enumerate(rows)}
        return svg.inline(axes.figure, key, title, f"{title}. {described}.", texts)


def bars(rows: Mapping[str, Mapping[str, float]], stages: Sequence[str], key: str, title: str) -> Markup:
    """Draw one bar per run, divided into stages by share of time. `rows`: seconds by stage, by run."""
    room = max(len(name) for name in rows) * LETTER
    with framed(36 + 30 * len(rows), left=12 + room, right=18, top=6, bottom=24) as axes:
        for i, parts in enumerate(rows.values()):
            left, total = 0.0, sum(parts.values())
            for stage, seconds in parts.items():
                _bar(axes, i, left, seconds / total, stages.index(stage))
                left += seconds / total
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), labels=[f"@{i}@" for i in range(len(rows))])
        axes.set_xlim(0, 1)
        axes.set_xticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
        axes.grid(visible=False)
        described = []
        for name, parts in rows.items():
            shares = (f"{stage} {percent(part / sum(parts.values()))}" for stage, part in parts.items())
            described.append(f"{name}: {', '.join(shares)}" if name else ", ".join(shares))
        return svg.inline(axes.figure, key, title, f"{title}. {'; '.join(described)}.", dict(enumerate(rows)))


def patch(style: int, key: str) -> Markup:
    """Draw the pattern of a stage's part of a bar, for a table."""
    with framed(12, left=1, right=1, top=1, bottom=1, width=24) as axes:
        axes.axis("off")
        _bar(axes, 0, 0, 1, style, height=1)
        axes.set_xlim(0, 1)
        axes.set_ylim(-0.5, 0.5)
        return svg.inline(axes.figure, key, "", "", {})


def swatch(style: int, key: str) -> Markup:
    """Draw the line and marker of a run, for a legend."""
    with framed(14, left=1, right=1, top=1, bottom=1, width=38) as axes:
        axes.axis("off")
        axes.plot([0, 0.5, 1], [0, 0, 0], **_look(style), marker=MARKERS[style % len(MARKERS)], markevery=[1])
        axes.set_xlim(0, 1)
        return svg.inline(axes.figure, key, "", "", {})


def _bar(axes: Axes, y: float, left: float, width: float, style: int, height: float = 0.56) -> None:
    colour, hatch = svg.series(style), HATCHES[style % len(HATCHES)]
    axes.barh(y, width, left=left, height=height, color=colour, alpha=0.3, linewidth=0)
    axes.barh(y, width, left=left, height=height, fill=False, edgecolor=colour, hatch=hatch, linewidth=0.8)


# ---- Helpers ---------------------------------------------------------------------------------------


@contextmanager
def framed(
    height: float, *, left: float, right: float, top: float, bottom: float, width: float = WIDTH
) -> Iterator[Axes]:
    """Create axes with margins in points, and only tick labels and faint grid lines drawn."""
    with mpl.rc_context(RC):
        figure = Figure(figsize=(width / 72, height / 72), dpi=72)
        place = (left / width, bottom / height, 1 - (left + right) / width, 1 - (top + bottom) / height)
        axes = figure.add_axes(place)
        figure.patch.set_visible(False)
        axes.patch.set_visible(False)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(svg.RULE)
        axes.tick_params(length=0, colors=svg.MUTED, labelcolor=svg.MUTED, pad=5)
        axes.grid(visible=True, axis="y", color=svg.RULE, linewidth=0.6)
        axes.set_axisbelow(True)
        yield axes


def _look(style: int) -> dict[str, Any]:
    return {"color": svg.series(style), "linestyle": DASHES[style % len(DASHES)], "clip_on": False}


def _line(axes: Axes, line: Line, *, marked: bool) -> None:
    """Draw a line with its band, its moving average if noisy, and markers.

    Short or held-out lines have a marker at every point; others at some points, if `marked`.
    """
    steps, values = (np.array(part) for part in line.points)
    look = _look(line.style)
    if line.band is not None:
        low, high = values - np.array(line.band[0]), values + np.array(line.band[1])
        axes.fill_between(steps, low, high, color=svg.series(line.style), alpha=0.16, linewidth=0)
    if _noisy(line):
        axes.plot(steps, values, **{**look, "linestyle": "-"}, linewidth=0.7, alpha=0.3)
    few = line.measured or len(values) <= MARKED
    each = 1 if few else len(values) // 8
    marker = MARKERS[line.style % len(MARKERS)] if few or marked else None
    places = (3 * line.style % each, each)  # different lines have markers at different steps
    axes.plot(
        steps, _bold(line), **look, linewidth=1.7, marker=marker, markersize=4, markevery=places, zorder=3
    )


def _scales(axes: Axes, panel: Panel) -> None:
    axes.margins(x=0.02, y=0.08)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
    if panel.rate:
        low, high = axes.get_ylim()
        axes.set_ylim(max(-0.02, low), min(1.02, high))
    steps = {step for line in panel.lines for step in line.points[0]}
    if len(steps) == 1:  # a single point needs an axis of some width
        (step,) = steps
        axes.set_xlim(step - 1, step + 1)
        axes.set_xticks([step])
    for axis, limits, setter in (
        (axes.xaxis, axes.get_xlim(), axes.set_xticks),
        (axes.yaxis, axes.get_ylim(), axes.set_yticks),
    ):
        shown = [value for value in axis.get_major_locator()() if limits[0] <= value <= limits[1]]
        scale = 100 if panel.rate and axis is axes.yaxis else 1
        labels = ticks([scale * value for value in shown])
        setter(shown, labels=[f"{text} %" if scale == 100 else text for text in labels])
    axes.text(0, 1.03, panel.unit, transform=axes.transAxes, color=svg.MUTED, fontsize=9, va="bottom")
    axes.text(1, -0.155, "step", transform=axes.transAxes, color=svg.MUTED, fontsize=9, va="top", ha="right")


def _end_labels(axes: Axes, lines: Sequence[Line]) -> None:
    """Write each line's label at its end, moved apart from labels that it would overlap."""
    named = [(i, line) for i, line in enumerate(lines) if line.label]
    ends = [axes.transData.transform((line.points[0][-1], _bold(line)[-1])) for _, line in named]
    order = sorted(range(len(named)), key=lambda k: float(ends[k][1]))
    heights = spread([float(ends[k][1]) for k in order], LABEL, *axes.bbox.intervaly)
    for height, k in zip(heights, order, strict=True):
        i, line = named[k]
        x, y = axes.transAxes.inverted().transform((ends[k][0], height))
        colour = svg.label(line.style)
        axes.text(
            x + 0.03, y, f"@{i}@", transform=axes.transAxes, color=colour, va="center", fontweight="bold"
        )


def spread(heights: Sequence[float], apart: float, lowest: float, highest: float) -> list[float]:
    """Move rising heights as little as possible so that neighbours are at least `apart` from each other.

    The result lies between `lowest` and `highest` if it fits. Least squares: after subtracting i * `apart`
    from the i-th height, the heights must not fall (isotonic regression).
    """
    if not heights:
        return []
    steps = apart * np.arange(len(heights))
    fitted = isotonic_regression(np.array(heights) - steps).x
    return [float(h) for h in np.clip(fitted, lowest, max(lowest, highest - steps[-1])) + steps]


def _noisy(line: Line) -> bool:
    return not line.measured and len(line.points[0]) >= SMOOTH_FROM


def _bold(line: Line) -> Sequence[float]:
    """Return the values drawn bold: a moving average if noisy (shorter windows at both ends), else all."""
    values, half = line.points[1], WINDOW // 2
    if not _noisy(line):
        return values
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [math.fsum(window) / len(window) for window in windows]


def _thinned(line: Line) -> Line:
    """Return a line with at most MOST_POINTS points: the means over blocks of equal size."""
    steps, values = line.points
    if len(steps) <= MOST_POINTS:
        return line
    size = math.ceil(len(steps) / MOST_POINTS)

    def means(numbers: Sequence[float]) -> tuple[float, ...]:
        parts = (numbers[start : start + size] for start in range(0, len(numbers), size))
        return tuple(math.fsum(part) / len(part) for part in parts)

    band = None if line.band is None else (means(line.band[0]), means(line.band[1]))
    return replace(line, points=(means(steps), means(values)), band=band)
