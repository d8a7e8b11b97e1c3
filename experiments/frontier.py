"""Draw the reward-against-KL chart of the comparison of all methods, in a light and a dark version.

python experiments/frontier.py          # write docs/frontier-light.svg and docs/frontier-dark.svg
python experiments/frontier.py --check  # exit with an error if the committed charts are not up to date

Each point is one method: mean gold reward and mean KL over its seeds. The rows are those of
experiments/results/all_methods.jsonl.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from all_methods import ARMS, RESULTS, rows_of
from comparison import mean_of, rows_of_one
from palate.methods import METHODS

DOCS = Path(__file__).resolve().parent.parent / "docs"

KINDS = {"supervised": "o", "offline": "s", "online": "D", "RL": "^"}
"""Marker of each group of methods: colour alone is not enough for every reader."""


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

BESIDE = {
    "rso": (7, -4), "slic-hf": (7, -10), "rrhf": (8, -4), "rest": (-6, 8), "rft": (6, 6), "ipo": (8, -3),
    "click": (8, -3), "pairwise-cringe": (-8, 8), "sft": (8, -10), "spin": (-10, 9),
}  # fmt: skip
"""Offset in points of each label from its point, where the usual one would cover a neighbour."""


class Point(NamedTuple):
    """One method on the chart."""

    method: str
    kind: str
    kl: float
    reward: float


def points(rows: Sequence[Mapping[str, Any]]) -> list[Point]:
    """The methods that learned from gold or from labelled data, means over their seeds."""
    made = []
    for method in ARMS:
        own = [row for row in rows_of_one([dict(r) for r in rows], method, None) if row["reward"] != "model"]
        if own:
            kind = METHODS[method].group
            made.append(Point(method, kind, mean_of(own, "kl"), mean_of(own, "reward_after")))
    return made


def chart(rows: Sequence[Mapping[str, Any]], theme: Theme) -> str:
    """The chart as SVG text, the same bytes for the same rows."""
    style = {
        "svg.hashsalt": "palate", "svg.fonttype": "path", "font.size": 10.5, "font.family": "DejaVu Sans",
        "text.color": theme.ink, "axes.labelcolor": theme.ink, "axes.edgecolor": theme.faint,
        "xtick.color": theme.ink, "ytick.color": theme.ink, "grid.color": theme.faint,
    }  # fmt: skip
    with mpl.rc_context(style):
        figure, axes = plt.subplots(figsize=(7.6, 4.2), layout="constrained")
        _draw(axes, rows, theme)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
        plt.close(figure)
    return text.getvalue()


def _draw(axes: Axes, rows: Sequence[Mapping[str, Any]], theme: Theme) -> None:
    placed = points(rows)
    before = mean_of([dict(row) for row in rows], "reward_before")
    axes.grid(visible=True, linewidth=0.6, alpha=0.6)
    axes.set_axisbelow(True)
    axes.scatter([0], [before], marker="*", s=120, color=theme.ink, zorder=3)
    axes.annotate("the model before training", (0, before), (9, -4), textcoords="offset points")
    for kind, marker in KINDS.items():
        own = [point for point in placed if point.kind == kind]
        if own:
            axes.scatter(
                [p.kl for p in own], [p.reward for p in own],
                marker=marker, s=46, color=theme.kinds[kind], label=f"{kind} methods", zorder=3,
            )  # fmt: skip
    for point in placed:
        shift = BESIDE.get(point.method, (8, -3))
        axes.annotate(
            point.method, (point.kl, point.reward), shift, textcoords="offset points",
            ha="left" if shift[0] > 0 else "right", color=theme.kinds[point.kind],
        )  # fmt: skip
    axes.set_xlabel("KL from the model before training (nats per completion)")
    axes.set_ylabel("mean reward on held-out prompts")
    axes.set_xlim(-0.4, max(p.kl for p in placed) + 1.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="lower right")


def main() -> None:
    """Write both charts, or check them."""
    rows = rows_of(RESULTS)
    old = []
    for name, theme in THEMES.items():
        path, text = DOCS / f"frontier-{name}.svg", chart(rows, theme)
        if sys.argv[1:] != ["--check"]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(path.name)
    if old:
        sys.exit(f"not up to date: {', '.join(old)}; run experiments/frontier.py")


if __name__ == "__main__":
    main()
