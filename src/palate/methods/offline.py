"""The loop of methods that learn from a fixed set of pairs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field

from palate.config import Config, MethodConfig, RewardConfig, Sampling
from palate.data import Stream
from palate.learn import Objective, Policy
from palate.run import Run
from palate.types import Pair


class OfflineConfig(MethodConfig, RewardConfig, Sampling):
    """What methods on fixed pairs share. Reward and sampling serve the measurement before and after."""


class PairBatches(Config):
    """Method"""

    batch_size: int = Field(16, ge=1)
    """Pairs per optimizer step."""
    epochs: float = Field(1.0, gt=0)
    """Passes over the pairs."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of epochs."""
    eval_every: int | None = Field(None, ge=1)
    """Measure on the held-out pairs every so many steps, besides before and after."""

    def total_steps(self, pairs: int) -> int:
        """Optimizer steps for a number of pairs; the last batch of an epoch runs into the next."""
        return self.steps or max(1, math.ceil(self.epochs * pairs / self.batch_size))


def fit(
    policy: Policy,
    pairs: Sequence[Pair],
    objective: Objective[Pair],
    cfg: PairBatches,
    run: Run,
    held_out: Sequence[Pair] = (),
) -> None:
    """Take shuffled batches, one optimizer step each, and measure on the held-out pairs as asked."""
    stream = Stream(pairs, seed=run.seed("pairs"))
    steps = cfg.total_steps(len(pairs))

    def measure(step: int) -> None:
        if held_out:
            found = policy.measure(held_out, objective)
            run.log_measurement(step, {f"eval_{name}": value for name, value in found.items()})

    measure(0)
    for step in run.steps(steps):
        metrics = policy.update(stream.batch(step, cfg.batch_size), objective)
        run.log(step, metrics, {"epoch": (step + 1) * cfg.batch_size / len(pairs)})
        if step + 1 == steps or (cfg.eval_every and (step + 1) % cfg.eval_every == 0):
            measure(step + 1)
