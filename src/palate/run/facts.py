"""Facts about a run that its journal keeps between starts."""

from __future__ import annotations

from pathlib import Path

from palate.errors import RunError
from palate.journal import Journal


def require_same(
    journal: Journal,
    directory: Path,
    name: str,
    value: str,
    label: str,
    *,
    otherwise: str = "start over with --overwrite or another --output",
) -> None:
    """Record a fact that must not change between the starts of a run; see `Run.require_same`.

    `otherwise` is the advice for a user who wants the change.
    """
    known = remember(journal, name, value)
    if known != value:
        raise RunError(
            f"{label} changed since the run in {str(directory)!r} started (hash {value[:12]}, was "
            f"{known[:12]}); restore the original, or {otherwise}"
        )


def remember(journal: Journal, name: str, value: str) -> str:
    """Return the value of a fact when the run started first; record `value` if it starts with this call."""
    known = journal.fact(name)
    if known is None:
        journal.keep_fact(name, value)
    return value if known is None else known
