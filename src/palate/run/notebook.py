"""The live view of a run in a notebook: one output under the cell, which is replaced as the run proceeds."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from typing import Any

from rich.console import Console, RenderableType

WIDTH = 100
"""Columns of the view."""

PAUSE = 0.5
"""Seconds between two updates: each is a message to the browser."""

_HTML = (
    "<pre style=\"white-space:pre;overflow-x:auto;line-height:normal;font-family:Menlo,'DejaVu Sans Mono',"
    "consolas,'Courier New',monospace\">{code}</pre>"
)


class NotebookView:
    """Shows what `view` returns, and replaces it at `refresh`.

    Needs IPython, which is there in every notebook, and no widgets.
    """

    def __init__(self, view: Callable[[], RenderableType]) -> None:
        self._view = view
        self._handle: Any = None
        self._shown = 0.0

    def start(self) -> None:
        """Show the view for the first time."""
        from IPython.display import display

        self._handle = display(self._rendered(), raw=True, display_id=True)
        self._shown = time.monotonic()

    def refresh(self) -> None:
        """Replace the view, unless it is new still."""
        if time.monotonic() - self._shown >= PAUSE:
            self._replace()

    def stop(self) -> None:
        """Leave the last state under the cell, for those who read the notebook later."""
        self._replace()

    def _replace(self) -> None:
        self._handle.update(self._rendered(), raw=True)
        self._shown = time.monotonic()

    def _rendered(self) -> dict[str, str]:
        """The view as a notebook shows it, and as text."""
        console = Console(
            file=io.StringIO(), record=True, width=WIDTH, force_jupyter=False, color_system="truecolor"
        )
        console.print(self._view())
        html = console.export_html(code_format=_HTML, inline_styles=True, clear=False)
        return {"text/html": html, "text/plain": console.export_text()}
