"""Parts of documents that a script writes, each between two marks that Markdown does not show."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def marked(name: str, lines: Sequence[str]) -> str:
    """A part between its marks."""
    return "\n".join((f"<!-- {name} -->", *lines, f"<!-- end of {name} -->"))


def write(page: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Put parts in the places of a page that have their marks.

    Raises:
        SystemExit: the page has no such place.
    """
    text = page.read_text(encoding="utf-8")
    for name, lines in parts.items():
        pattern = re.compile(f"<!-- {name} -->.*?<!-- end of {name} -->", re.DOTALL)
        part = marked(name, lines)
        text, found = pattern.subn(lambda _, part=part: part, text)
        if found != 1:
            raise SystemExit(f"{page} has {found} places marked <!-- {name} -->, expected one")
    page.write_text(text, encoding="utf-8")


def missing(page: Path, parts: Mapping[str, Sequence[str]]) -> list[str]:
    """Names of the parts that a page does not have as they are."""
    text = page.read_text(encoding="utf-8")
    return [name for name, lines in parts.items() if marked(name, lines) not in text]
