"""Write a page of measurements: one HTML file without scripts that loads nothing from elsewhere."""

from __future__ import annotations

import importlib.metadata
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from markupsafe import Markup

from palate.errors import RunError
from palate.report.render import HERE, environment, style_hash

MOST_SAMPLES = 40
"""Most prompts whose completions are shown side by side."""


def write_page(template: str, target: Path, **context: Any) -> Path:
    """Render a template of this folder into a file, which is complete or unchanged.

    Raises:
        RunError: the file cannot be written.
    """
    style = Markup((HERE / "style.css").read_text(encoding="utf-8"))
    page = (
        environment()
        .get_template(template)
        .render(
            style=style,
            style_hash=style_hash(style),
            version=importlib.metadata.version("palate"),
            **context,
        )
    )
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        part.write_text(page, encoding="utf-8", newline="\n")
        os.replace(part, target)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise RunError(f"the page {str(target)!r} cannot be written: {error.strerror or error}") from None
    return target
