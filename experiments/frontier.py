"""Draw reward against KL for the compared methods, in a light and a dark version.

python experiments/frontier.py          # write docs/frontier-light.svg and docs/frontier-dark.svg
python experiments/frontier.py --check  # exit with an error if the committed charts are not up to date

Each point is one method: mean reward and mean KL over its seeds. Faint points are its earlier checkpoints,
which `palate compare` measures on fewer prompts. The numbers are those of
experiments/results/comparison.json.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

import comparison_rows
from palate.methods import METHODS
from placing import Box, Spot, place

DOCS = Path(__file__).resolve().parent.parent / "docs"

KINDS = {"supervised": "o", "offline": "s", "online": "D", "RL": "^"}
"""Marker of each group of methods: colour alone is not enough for every reader."""
FONT, LARGE, START = "DejaVu Sans", 10.5, "the model before training"
"""Font, size of the letters in points, and the label of the base model."""
MARK, SMALL, STAR = 46, 9, 120
"""Areas of the markers: of a method, of an earlier checkpoint, of the base model."""
STAR_GAP = 3.0
"""Points that the label of the base model keeps from its larger marker, besides the usual distance."""
LEADER = 14.0
"""Distance in points from which a line joins a label to its point."""


class Theme(NamedTuple):
    """Colours of one version of the chart."""

    ink: str
    faint: str
    kinds: Mapping[str, str]


THEMES = {
    "light": Theme(
        "#1f2328", "#d0d7de",
        {"supervised": "#6e7781", "offline": "#0a62c9", "online": "#bc4c00", "RL": "#1a7f37"},
    ),
    "dark": Theme(
        "#e6edf3", "#3d444d",
        {"supervised": "#9198a1", "offline": "#6cb0ff", "online": "#ff9a4d", "RL": "#56d364"},
    ),
}  # fmt: skip


class Point(NamedTuple):
    """One method on the chart, or an earlier checkpoint of it."""

    method: str
    kind: str
    kl: float
    reward: float


def points(result: Mapping[str, Any]) -> list[Point]:
    """Return the methods whose reward and KL are known, means over their seeds.

    A method that was measured with the annotator and with a reward model is shown with the annotator.
    """
    direct = {row["name"]: row for row in result["direct"]}
    return [
        Point(row["name"], METHODS[row["method"]].group, row["kl"], row["reward"])
        for row in (direct.get(row["name"], row) for row in result["methods"])
        if row.get("kl") is not None and row.get("reward") is not None
    ]


def earlier(result: Mapping[str, Any]) -> list[Point]:
    """Return the earlier checkpoints, means over the seeds that have one at the same step."""
    direct = {row["name"] for row in result["direct"]}
    kinds = {row["name"]: METHODS[row["method"]].group for row in result["methods"]}
    by_step: dict[tuple[str, int], list[tuple[float, float]]] = {}
    for point in result["frontier"]:
        if point["arm"] in direct:
            continue
        if not point["result"] and point["kl"] is not None and point["reward"] is not None:
            by_step.setdefault((point["arm"], point["step"]), []).append((point["kl"], point["reward"]))
    return [
        Point(name, kinds[name], fmean(kl for kl, _ in several), fmean(reward for _, reward in several))
        for (name, _), several in by_step.items()
    ]


def chart(result: Mapping[str, Any], theme: Theme) -> str:
    """Return the chart as SVG text, the same bytes for the same numbers."""
    style: Any = {
        "svg.hashsalt": "palate", "svg.fonttype": "path", "font.size": LARGE, "font.family": FONT,
        "figure.dpi": 72,
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink, "ytick.color": theme.ink, "grid.color": theme.faint,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.6, 4.6), layout="constrained")
        _draw(axes, result, theme)
        figure.draw_without_rendering()  # the layout is final, so that labels can be placed in points
        figure.set_layout_engine("none")
        _label(axes, result, theme)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return text.getvalue()


def _draw(axes: Axes, result: Mapping[str, Any], theme: Theme) -> None:
    """Draw axes and points without their labels."""
    placed, before, start = points(result), earlier(result), result["base"]["reward"]
    axes.grid(visible=True, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    if start is not None:
        axes.scatter([0], [start], marker="*", s=STAR, color=theme.ink, zorder=3)
    for kind, marker in KINDS.items():
        own, old = ([p for p in several if p.kind == kind] for several in (placed, before))
        look: Mapping[str, Any] = {"marker": marker, "color": theme.kinds[kind], "linewidth": 0}
        if old:
            axes.scatter([p.kl for p in old], [p.reward for p in old], s=SMALL, alpha=0.45, zorder=2, **look)
        if own:
            label = f"{kind} methods"
            axes.scatter([p.kl for p in own], [p.reward for p in own], s=MARK, label=label, zorder=3, **look)
    axes.set_xlabel("KL from the model before training (nats per completion)")
    axes.set_ylabel("mean reward on held-out prompts")
    axes.margins(0.06)
    axes.spines[["top", "right"]].set_visible(False)
    axes.figure.legend(frameon=False, loc="outside upper center", ncols=len(KINDS), handletextpad=0.2)


def _label(axes: Axes, result: Mapping[str, Any], theme: Theme) -> None:
    """Write the labels where they cover neither points nor each other."""
    start = result["base"]["reward"]
    named = [(p.method, p.kl, p.reward, theme.kinds[p.kind]) for p in points(result)]
    named += [] if start is None else [(START, 0.0, start, theme.ink)]
    gaps = {START: STAR_GAP}
    spots = [
        Spot(*_place(axes, kl, reward), *_size(name), gaps.get(name, 0.0)) for name, kl, reward, _ in named
    ]
    frame = axes.get_window_extent()
    old = [_place(axes, p.kl, p.reward) for p in earlier(result)]
    boxes = place(
        spots,
        Box(frame.x0 + 2, frame.y0 + 2, frame.x1, frame.y1),
        faint=[Box(x - 2, y - 2, x + 2, y + 2) for x, y in old],
    )
    for (name, kl, reward, colour), spot, box in zip(named, spots, boxes, strict=True):
        shift = (box.left - spot.x, box.low - spot.y)
        near = (min(max(spot.x, box.left), box.right), min(max(spot.y, box.low), box.high))
        if math.hypot(near[0] - spot.x, near[1] - spot.y) >= LEADER:
            line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 3}
            end = (near[0] - spot.x, near[1] - spot.y)
            axes.annotate("", (kl, reward), end, textcoords="offset points", zorder=1, arrowprops=line)
        drop = -_bounds(name)[1]  # the annotation's place is that of its baseline
        axes.annotate(
            name, (kl, reward), (shift[0], shift[1] + drop), textcoords="offset points", va="baseline",
            color=colour,
        )  # fmt: skip


def _place(axes: Axes, kl: float, reward: float) -> tuple[float, float]:
    """Return a point's place in the figure, in points: at 72 dots per inch, a dot is a point."""
    x, y = axes.transData.transform((kl, reward))
    return float(x), float(y)


def _size(name: str) -> tuple[float, float]:
    """Return width and height of a label in points."""
    _, low, width, high = _bounds(name)
    return width + 1, high - low


def _bounds(name: str) -> tuple[float, float, float, float]:
    """Return the extents of a label's letters in points, from the start of its baseline."""
    extents = TextPath((0, 0), name, size=LARGE, prop=FontProperties(family=FONT)).get_extents()
    return float(extents.x0), float(extents.y0), float(extents.x1), float(extents.y1)


def main() -> None:
    """Write both charts, or check them."""
    result = comparison_rows.rows()
    old = []
    for name, theme in THEMES.items():
        path, text = DOCS / f"frontier-{name}.svg", chart(result, theme)
        if sys.argv[1:] != ["--check"]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(path.name)
    if old:
        sys.exit(f"not up to date: {', '.join(old)}; run experiments/frontier.py")


if __name__ == "__main__":
    main()
