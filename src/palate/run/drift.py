"""The KL of a policy to its start: measured during training, which ends before it passes a bound."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

KL = "kl/fresh"
"""Metric of the measurements: KL in nats per completion, from samples of the policy at temperature 1."""


class BoundReachedError(Exception):
    """Ends training from within `Run.steps`; the learners are at the last checkpoint within the bound."""


@dataclass(frozen=True)
class Drift:
    """When and how the KL is measured during training.

    Attributes:
        measure: gives the KL of the policy as it is, in nats per completion, after so many steps.
        every: steps between two measurements.
        most: the bound; None to measure without one.
    """

    measure: Callable[[int], float]
    every: int
    most: float | None = None

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
        """Return whether to measure after so many steps; with a bound, also after the last of a stage."""
        return step % self.every == 0 or (last and self.most is not None)
