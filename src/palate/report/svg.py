"""Convert matplotlib figures to inline SVG: themed colours, real text, no links to other resources."""

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
    "svg.fonttype": "none",  # keep text as text
    "svg.hashsalt": "palate",  # make the output reproducible
}

INK, MUTED, RULE = "#010101", "#020202", "#030303"
"""Placeholders for the colours of text, secondary text and faint lines; the page's theme sets them."""
COLOURS = 6
"""Number of series colours; the style sheet defines each for the light and the dark theme."""

_THEMED = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)"} | {
    f"#0{kind}01{10 + i}": f"var(--{name}{i})" for kind, name in ((1, "s"), (2, "t")) for i in range(COLOURS)
}
_LINK = re.compile(r"#([\w.-]+)")
_LONG = re.compile(r"-?\d+\.\d{3,}")
_STAND_IN = re.compile(r"^@(\d+)@$")
_TURN = re.compile(r"rotate\(-?0 ")


def series(style: int) -> str:
    """Return the placeholder for a series' colour."""
    return f"#0101{10 + style % COLOURS}"


def label(style: int) -> str:
    """Return the placeholder for the colour of a series' label: the same hue, but dark enough to read."""
    return f"#0201{10 + style % COLOURS}"


def inline(figure: object, key: str, title: str, description: str, texts: Mapping[int, str]) -> Markup:
    """Return a figure as an inline SVG element.

    Styles become attributes, so that the page needs no inline styles. Ids are prefixed with the key, so that
    no two plots of a page share an id.

    Args:
        figure: the matplotlib figure.
        key: a name that is unique in the page.
        title: the plot's title; if empty, the plot is hidden from screen readers.
        description: the text for screen readers.
        texts: replacements for the placeholders `@0@`, `@1@`, ... in the figure. They come from names of runs
            and metrics; matplotlib would look for their letters in its own font.
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
    spoken = ElementTree.Element("title", id=f"{key}-title")
    spoken.text = plain(description)
    root.insert(0, spoken)


def _drop_ids(root: ElementTree.Element) -> None:
    """Remove ids that nothing in the figure refers to."""
    used = {
        link for element in root.iter() for value in element.attrib.values() for link in _LINK.findall(value)
    }
    for element in root.iter():
        if element.get("id") not in used:
            element.attrib.pop("id", None)


def _clean(element: ElementTree.Element, key: str) -> None:
    """Replace colours by theme variables and styles by attributes, and prefix ids and links with the key."""
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
    """Return a tag without its namespace, which inline SVG does not need."""
    return tag.rpartition("}")[2]
