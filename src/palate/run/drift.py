"""The KL of a policy to its start, measured during training, which ends before the KL exceeds a bound."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from palate.model import Snapshot

REWARD = "reward/fresh"
"""Metric of the measurements with `keep` best: the mean reward of the same training prompts."""
KL = "kl/fresh"
"""Metric of the measurements: KL in nats per completion, from samples of the policy at temperature 1."""


Contest = Callable[[Snapshot, Snapshot], Mapping[str, float]]
"""Compares an earlier policy with a later one on held-out prompts, and returns the metrics."""


class BoundReachedError(Exception):
    """Ends training inside `Run.steps`; the learners are at the last checkpoint within the bound."""


@dataclass(frozen=True)
class Drift:
    """The schedule and the method of KL measurements during training.

    Attributes:
        measure: returns the KL of the current policy, in nats per completion, after a number of steps.
        every: steps between two measurements.
        most: the bound; None to measure without a bound.
        reward: returns the mean reward after a number of steps, by which the best checkpoint is kept; None
            keeps the last one.
    """

    measure: Callable[[int], float]
    every: int
    most: float | None = None
    reward: Callable[[int], float] | None = None

    @property
    def saves(self) -> bool:
        """True if a checkpoint is saved at each measurement."""
        return self.most is not None or self.reward is not None

    def numbers(self, step: int) -> dict[str, float]:
        """Measure after a number of steps; return the metrics."""
        numbers = {KL: self.measure(step)}
        return numbers if self.reward is None else {**numbers, REWARD: self.reward(step)}

    def marks(self, numbers: Mapping[str, float]) -> dict[str, Any]:
        """Return the fields of a `Position` after a measurement; empty if it saves no checkpoint."""
        if not self.saves:
            return {}
        return {"within": self.most is not None, "reward": numbers.get(REWARD)}

    def explain(self, kl: float, done: int, step: int) -> str:
        """Return the message at the end of training: the KL after `done` steps is above the bound."""
        return (
            f"the KL after step {done} is {kl:.2f} nats, above max_kl {self.most:g}: training ends with the "
            f"weights of step {step}"
        )

    def allows(self, kl: float) -> bool:
        """Return whether a KL lies within the bound; any does where there is none."""
        return self.most is None or kl <= self.most

    def is_due(self, step: int, *, last: bool) -> bool:
        """Return whether to measure after so many steps; if it saves, also after the last of a stage."""
        return step % self.every == 0 or (last and self.saves)
