"""Matplotlib's SVG as a part of a page: colours by theme, text as text, nothing that points outside."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from typing import Any
from xml.etree import ElementTree

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.figure import Figure

from palate.run import plain

RC: Any = {
    "svg.fonttype": "none",  # texts stay texts
    "svg.hashsalt": "palate",  # the same numbers give the same file
}

INK, MUTED, RULE = "#010101", "#020202", "#030303"
"""Stand-ins for the colours of text, lesser text and faint lines: what they are depends on the theme."""
COLOURS = 6
"""Colours of series; the style sheet has them twice, for light and for dark."""

_THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"} | {
    f"#0{kind}01{10 + i}": f"var(--{name}{i})" for kind, name in ((1, "s"), (2, "t")) for i in range(COLOURS)
}
_LINK = re.compile(r"#([\w.-]+)")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_STAND_IN = re.compile(r"^@(\d+)@$")
_TURN = re.compile(r"rotate\(-?0 ")


def series(style: int) -> str:
    """Stand-in for a series' colour."""
    return f"#0101{10 + style % COLOURS}"


def label(style: int) -> str:
    """Stand-in for the colour of text that names a series: the same hue, dark enough to be read."""
    return f"#0201{10 + style % COLOURS}"


def inline(figure: object, key: str, title: str, description: str, texts: Mapping[int, str]) -> Markup:
    """A figure as an inline SVG element.

    Styles become attributes, so that the page needs no inline styles; ids get the key before them, so that
    no two plots of a page share one.

    Args:
        figure: what has been drawn.
        key: unique in the page.
        title: what is read to those who do not see it; without, it is hidden from them.
        description: the same in full.
        texts: what `@0@`, `@1@`, ... in the figure stand for. They come from names of runs and metrics, and
            are put in here since matplotlib would look for their letters in its own font.
    """
    assert isinstance(figure, Figure)
    out = io.StringIO()
    with mpl.rc_context(RC):
        figure.savefig(out, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    root = ElementTree.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if _name(child.tag) in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _clean(element, key)
        element.tail = None
        element.text = _STAND_IN.sub(lambda m: plain(texts[int(m[1])]), (element.text or "").strip()) or None
    _drop_ids(root)
    _head(root, key, title, description)
    return Markup(ElementTree.tostring(root, encoding="unicode"))  # escaped by ElementTree


def _head(root: ElementTree.Element, key: str, title: str, description: str) -> None:
    box = root.get("viewBox", "")
    root.attrib.clear()
    root.set("viewBox", box)
    if not title:
        root.set("aria-hidden", "true")
        return
    root.attrib |= {"role": "img", "aria-labelledby": f"{key}-title"}
    said = ElementTree.Element("title", id=f"{key}-title")
    said.text = plain(description)
    root.insert(0, said)


def _drop_ids(root: ElementTree.Element) -> None:
    """Keep the ids that something in the figure points at."""
    used = {
        link for element in root.iter() for value in element.attrib.values() for link in _LINK.findall(value)
    }
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _clean(element: ElementTree.Element, key: str) -> None:
    """Themed colours, attributes for styles, links within the page's own plot."""
    element.tag = _name(element.tag)
    attributes = {_name(name): value for name, value in element.attrib.items()}
    for declaration in attributes.pop("style", "").split(";"):
        name, _, value = declaration.partition(":")
        if value and not name.strip().startswith("font"):
            attributes[name.strip()] = value.strip()
        elif "bold" in value:
            attributes["class"] = "bold"
    for name, value in attributes.items():
        if name == "id":
            attributes[name] = f"{key}-{value}"
        elif name in ("href", "clip-path") or value.startswith("url("):
            attributes[name] = _LINK.sub(rf"#{key}-\1", value)
        else:
            attributes[name] = _THEMED.get(value) or _LONG.sub(lambda m: f"{float(m[0]):.2f}", value)
    if _TURN.match(attributes.get("transform", "")):
        del attributes["transform"]
    element.attrib.clear()
    element.attrib |= attributes


def _name(tag: str) -> str:
    """Without the namespace, which a page's own SVG needs not."""
    return tag.rpartition("}")[2]
