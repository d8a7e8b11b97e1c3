"""Draw the rounds of self-rewarding, in a light and a dark version.

python experiments/self_rewarding_picture.py          # write docs/self-rewarding-light.svg and -dark.svg
python experiments/self_rewarding_picture.py --check  # exit with an error if the pictures are not up to date
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent.parent / "docs"

WIDTH, HEIGHT = 760, 300


class Theme(NamedTuple):
    """Colours of one version."""

    ink: str
    faint: str
    model: str
    data: str


THEMES = {
    "light": Theme("#1f2328", "#8c959f", "#ddf4ff", "#fff1e5"),
    "dark": Theme("#e6edf3", "#7d8590", "#0c2d6b", "#4d2d12"),
}


class Box(NamedTuple):
    """A box with one or two lines of text; models are round, data have corners."""

    x: int
    y: int
    title: str
    line: str
    model: bool = False

    @property
    def width(self) -> int:
        """Width in pixels."""
        return 92 if self.model else 128


MODELS = [
    Box(20, 40, "M0", "the model", model=True),
    Box(210, 40, "M1", "answers, grades", model=True),
    Box(440, 40, "M2", "answers, grades", model=True),
    Box(648, 40, "M3", "", model=True),
]
STEPS = [
    Box(20, 200, "new prompts", "by a fixed model"),
    Box(176, 200, "n completions", "sampled from M_t"),
    Box(332, 200, "3 gradings each", "by M_t; their mean"),
    Box(488, 200, "pairs", "best and worst"),
]
TALL = 52


def picture(theme: Theme) -> str:
    """Return the picture as SVG text."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="DejaVu Sans, Verdana, sans-serif" font-size="12" '
        f'fill="{theme.ink}">',
        "<title>The rounds of self-rewarding</title>",
        '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0 0 8 4 0 8z" fill="{theme.faint}"/></marker></defs>',
    ]
    for (box, after), word in zip(pairwise(MODELS), ("IFT + EFT", "round 1", "round 2"), strict=True):
        start, end, middle = box.x + box.width, after.x, box.y + TALL // 2
        parts.append(_arrow(f"M{start} {middle}H{end - 2}", theme))
        parts.append(_text((start + end) // 2, middle - 8, word))
    for box, after in pairwise(STEPS):
        parts.append(_arrow(f"M{box.x + box.width} {box.y + TALL // 2}H{after.x - 2}", theme))
    last, middle = STEPS[-1], STEPS[0].y + TALL // 2
    parts.append(_arrow(f"M{last.x + last.width} {middle}H{WIDTH - 66}", theme))
    parts.append(_text(WIDTH - 34, middle - 4, "DPO"))
    parts.append(_text(WIDTH - 34, middle + 12, "from M_t"))
    dashed = f'fill="none" stroke="{theme.faint}" stroke-dasharray="4 4"'
    parts.append(f'<rect x="8" y="150" width="{WIDTH - 16}" height="130" rx="10" {dashed}/>')
    parts.append(f'<path d="M371 68V150M601 68V150" {dashed}/>')
    parts.append(
        _text(WIDTH // 2, 175, "a round: from M_t to M_t+1, which answers and grades in the next round")
    )
    parts += [_box(box, theme) for box in (*MODELS, *STEPS)]
    return "\n".join([*parts, "</svg>", ""])


def _arrow(path: str, theme: Theme) -> str:
    return f'<path d="{path}" fill="none" stroke="{theme.faint}" stroke-width="1.6" marker-end="url(#tip)"/>'


def _text(x: int, y: int, words: str, *, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x}" y="{y}" text-anchor="middle"{weight}>{words}</text>'


def _box(box: Box, theme: Theme) -> str:
    fill, corner = (theme.model, 26) if box.model else (theme.data, 4)
    middle = box.x + box.width // 2
    lines = [_text(middle, box.y + (22 if box.line else 31), box.title, bold=True)]
    if box.line:
        lines.append(f'<g font-size="10.5">{_text(middle, box.y + 39, box.line)}</g>')
    frame = f'width="{box.width}" height="{TALL}" rx="{corner}" fill="{fill}" stroke="{theme.faint}"'
    return "\n".join([f'<rect x="{box.x}" y="{box.y}" {frame}/>', *lines])


def main() -> None:
    """Write both pictures, or check them."""
    old = []
    for name, theme in THEMES.items():
        path, text = DOCS / f"self-rewarding-{name}.svg", picture(theme)
        if sys.argv[1:] != ["--check"]:
            path.write_text(text, encoding="utf-8")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            old.append(path.name)
    if old:
        sys.exit(f"not up to date: {', '.join(old)}; run experiments/self_rewarding_picture.py")


if __name__ == "__main__":
    main()
