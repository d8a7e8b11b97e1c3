"""Checks that stop a failing run, and the data that it saves for inspection."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.data import write_rows
from palate.errors import NonFiniteError, RunError

_KEPT = frozenset({"pairs/kept", "rollouts/kept"})


class DeadSteps:
    """Stops a run that learns nothing, since it would cost time and look as if it worked.

    Args:
        most: number of steps in a row without a pair that ends the run.
        rows: metrics of the earlier steps.
    """

    def __init__(self, most: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._most = most
        steps = [row for row in rows if _KEPT & row.keys()]  # without measurements
        self._count = sum(1 for _ in itertools.takewhile(_is_dead, reversed(steps)))

    def see(self, row: Mapping[str, Any]) -> None:
        """Check a step's metrics.

        Raises:
            RunError: too many steps in a row had no pair.
        """
        self._count = self._count + 1 if _is_dead(row) else 0
        if self._count < self._most:
            return
        if row.get("rollouts/kept") == 0:
            raise RunError(
                f"no completion with a usable reward in {self._count} steps in a row; check why the reward "
                "returns no number. To continue anyway, raise --max-dead-steps"
            )
        reasons = ", ".join(
            f"{value} {name.removeprefix('pairs/dropped_')}"
            for name, value in row.items()
            if name.startswith("pairs/dropped_") and value
        )
        raise RunError(
            f"no pair to learn from in {self._count} steps in a row (in the last one: {reasons}). tie: the "
            "reward seldom differs between completions of a prompt, so use a finer reward, a larger --n or a "
            "smaller --tie; identical: raise --temperature or --max-new-tokens; unusable: check why the "
            "reward returns no number. To continue anyway, raise --max-dead-steps"
        )


def save_batch(path: Path, error: NonFiniteError) -> None:
    """Write the completions of a batch whose loss or gradient was not finite."""
    rows = [
        {"prompt": record.prompt.text, "completion": c.text, "token_ids": c.token_ids}
        for record in error.records
        for c in record.completions
    ]
    write_rows(path, rows)


def _is_dead(row: Mapping[str, Any]) -> bool:
    return any(row.get(name) == 0 for name in _KEPT)
