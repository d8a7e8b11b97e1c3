"""Runs: directory, journal, checkpoints, metrics, progress."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from palate.run.display import Display, plain

if TYPE_CHECKING:
    from palate.run.metrics import Metrics
    from palate.run.run import Run

__all__ = ["Display", "Metrics", "Run", "plain"]


def __getattr__(name: str) -> Any:
    """`Run` and `Metrics` when they are asked for: they bring torch, which listing runs need not wait for."""
    if name in ("Metrics", "Run"):
        from palate.run import run

        return getattr(run, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
