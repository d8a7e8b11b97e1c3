"""Generated parts of Markdown documents, each between two invisible marks."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path


def marked(name: str, lines: Sequence[str]) -> str:
    """Return a part between its marks."""
    return "\n".join((f"<!-- {name} -->", *lines, f"<!-- end of {name} -->"))


def write(page: Path, parts: Mapping[str, Sequence[str]]) -> None:
    """Replace the marked parts of a page.

    Raises:
        SystemExit: the page lacks the marks of a part.
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
    """Return the names of the parts that differ from the page or are missing in it."""
    text = page.read_text(encoding="utf-8")
    return [name for name, lines in parts.items() if marked(name, lines) not in text]
