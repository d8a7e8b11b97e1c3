"""Draw points with intervals, one colour and marker for each method, joined in the order of training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from palate.report import svg
from palate.report.plots import DASHES, HEIGHT, LETTER, LONGEST_LABEL, MARKERS, framed
from palate.report.words import number


@dataclass(frozen=True)
class Dot:
    """A point: its place, half-open marker if `faint`, and the interval of its height."""

    x: float
    y: float
    low: float | None = None
    high: float | None = None
    faint: bool = False


def scatter(
    series: Mapping[str, Sequence[Sequence[Dot]]],
    key: str,
    title: str,
    x: str,
    y: str,
    *,
    guide: float | None = None,
    from_zero: bool = False,
) -> Markup:
    """Return a scatter plot as SVG.

    Args:
        series: for each method, its lines: points to join.
        key: a name that is unique in the page.
        title, x, y: the plot's title and what its axes show, for screen readers and labels.
        guide: draw a horizontal line here.
        from_zero: begin the horizontal axis at zero.
    """
    texts = {0: x, 1: y, **{i + 2: name[:LONGEST_LABEL] for i, name in enumerate(series)}}
    room = max((len(text) for i, text in texts.items() if i > 1), default=0) * LETTER
    with framed(HEIGHT + 42, left=48, right=14 + room, top=18, bottom=44) as axes:
        ends = []
        for style, lines in enumerate(series.values()):
            colour = svg.series(style)
            look: dict[str, Any] = {"color": colour, "clip_on": False}
            for line in lines:
                axes.plot(
                    [dot.x for dot in line], [dot.y for dot in line], linewidth=0.9, alpha=0.7,
                    linestyle=DASHES[(style // svg.COLOURS) % len(DASHES)], **look,
                )  # fmt: skip
                for dot in line:
                    if dot.low is not None and dot.high is not None:
                        axes.plot([dot.x, dot.x], [dot.low, dot.high], linewidth=1.2, alpha=0.6, **look)
                    axes.plot(
                        [dot.x], [dot.y], marker=MARKERS[style % len(MARKERS)], linestyle="none",
                        markersize=3.5 if dot.faint else 6.5, alpha=0.55 if dot.faint else 1.0, **look,
                    )  # fmt: skip
            last = [line[-1] for line in lines if line]
            if last:
                ends.append((sum(dot.y for dot in last) / len(last), style))
        if guide is not None:
            axes.axhline(guide, color=svg.MUTED, linewidth=0.8, linestyle=(0, (3, 3)), zorder=1)
        if from_zero:
            axes.set_xlim(left=0)
        low, high = axes.get_ylim()
        gap, place = (high - low) * 0.075, float("-inf")
        for height, style in sorted(ends):
            place = max(height, place + gap)
            axes.text(
                1.04, place, f"@{style + 2}@", transform=axes.get_yaxis_transform(), va="center",
                color=svg.label(style), clip_on=False,
            )  # fmt: skip
        axes.set_xlabel("@0@", color=svg.MUTED)
        axes.set_title("@1@", loc="left", fontsize=10, color=svg.MUTED)
        described = "; ".join(
            f"{name}: "
            + ", ".join(f"({number(dot.x)}, {number(dot.y)})" for line in lines for dot in line[-1:])
            for name, lines in series.items()
        )
        return svg.inline(axes.figure, key, title, f"{title}. {x} against {y}. {described}.", texts)
