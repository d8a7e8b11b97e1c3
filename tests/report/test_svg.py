from __future__ import annotations

import re
from xml.etree import ElementTree

from matplotlib.figure import Figure

from palate.report import svg
from palate.report.plots import swatch


def drawing() -> Figure:
    figure = Figure(figsize=(2, 1))
    axes = figure.add_axes((0.1, 0.1, 0.8, 0.8))
    axes.plot([0, 1], [0, 1], color=svg.series(7), marker="o")
    axes.text(0.5, 0.5, "@0@", color=svg.label(0), fontweight="bold")
    axes.axhline(0.5, color=svg.MUTED)
    return figure


def test_colours_are_the_themes() -> None:
    found = svg.inline(drawing(), "k", "T", "T.", {0: "x"})
    assert 'stroke="var(--s1)"' in found  # the eighth has the second's colour: there are six
    assert "var(--t0)" in found
    assert "var(--muted)" in found
    assert not re.search(r"#0[12]01", found)


def test_nothing_needs_inline_styles_or_points_outside() -> None:
    found = svg.inline(drawing(), "k", "T", "T.", {0: "x"})
    assert "style" not in found
    assert "http" not in found
    assert "DejaVu" not in found
    root = ElementTree.fromstring(found)
    tags = {"svg", "title", "g", "defs", "path", "use", "text", "clipPath", "rect"}
    assert {element.tag for element in root.iter()} <= tags
    ids = {element.get("id") for element in root.iter()} - {None}
    links = set(re.findall(r"#(k-[\w.-]+)", found))
    assert links | {"k-title"} == ids


def test_two_figures_share_no_id() -> None:
    first, second = (set(re.findall(r' id="([^"]+)"', svg.inline(drawing(), k, k, k, {0: ""}))) for k in "ab")
    assert first
    assert not first & second


def test_texts_and_descriptions_are_escaped_and_made_visible() -> None:
    found = svg.inline(drawing(), "k", "T", "<b>\x1b&", {0: "</text><script>\u202e"})
    root = ElementTree.fromstring(found)
    assert root.findtext("title") == "<b>\ufffd&"
    assert "</text><script>\ufffd" in [element.text for element in root.iter("text")]
    assert "<script>" not in found


def test_the_same_figure_gives_the_same_text() -> None:
    assert swatch(3, "k") == swatch(3, "k")
