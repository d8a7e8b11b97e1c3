"""What stops a run that goes wrong, and what it leaves to look at."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.data import write_rows
from palate.errors import NonFiniteError, RunError

_KEPT = frozenset({"pairs/kept", "rollouts/kept"})


class DeadSteps:
    """Stops a run in which nothing is learnt: it would go on costing, and look as if it worked.

    Args:
        most: so many steps in a row without a pair end the run.
        rows: metrics of the steps before.
    """

    def __init__(self, most: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._most = most
        steps = [row for row in rows if _KEPT & row.keys()]  # not what was measured between them
        self._count = sum(1 for _ in itertools.takewhile(_is_dead, reversed(steps)))

    def see(self, row: Mapping[str, Any]) -> None:
        """Look at a step's metrics.

        Raises:
            RunError: it was one too many.
        """
        self._count = self._count + 1 if _is_dead(row) else 0
        if self._count < self._most:
            return
        if row.get("rollouts/kept") == 0:
            raise RunError(
                f"no completion with a usable reward in {self._count} steps in a row; see why the reward "
                "gives nothing. To go on as it is, raise --max-dead-steps"
            )
        told = ", ".join(
            f"{value} {name.removeprefix('pairs/dropped_')}"
            for name, value in row.items()
            if name.startswith("pairs/dropped_") and value
        )
        raise RunError(
            f"no pair to learn from in {self._count} steps in a row (in the last one: {told}). tie: the "
            "reward tells the completions of a prompt apart too rarely, so take a finer reward, a larger "
            "--n, or a smaller --tie; identical: raise --temperature or --max-new-tokens; unusable: see why "
            "the reward gives nothing. To go on as it is, raise --max-dead-steps"
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
