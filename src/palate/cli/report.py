"""`palate report`: write the page on one or several runs, and open it."""

from __future__ import annotations

import webbrowser
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.text import Text

from palate.errors import RunError
from palate.report import write_report
from palate.run.display import plain


def report(runs: Sequence[Path], *, output: Path | None, show: bool) -> int:
    """Write a report, and say where it is."""
    try:
        path = write_report(runs, output)
    except OSError as error:
        raise RunError(f"the report cannot be written: {error.strerror or error}") from error
    Console().print(Text(plain(str(path))), soft_wrap=True)
    if show and not webbrowser.open(path.resolve().as_uri()):
        raise RunError(f"no browser could be started; open {str(path)!r} yourself")
    return 0
