"""The loop of methods that learn from a fixed set of records."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar, Self, TypeVar

from pydantic import Field, model_validator

from palate.config import Config, MethodConfig, RewardConfig, Sampling
from palate.data import Stream
from palate.learn import Learner, Objective
from palate.method import DIRECT
from palate.run import Run
from palate.types import Record

R = TypeVar("R", bound=Record)


class OfflineConfig(MethodConfig, RewardConfig, Sampling):
    """What methods on fixed records share. Reward and sampling serve the measurement before and after."""


class PairBatches(Config):
    """Method"""

    batch_size: int = Field(16, ge=1)
    """Pairs (or demonstrations) per optimizer step."""
    epochs: float = Field(1.0, gt=0)
    """Passes over them."""
    steps: int | None = Field(None, ge=1)
    """Optimizer steps, instead of epochs."""
    eval_every: int | None = Field(None, ge=1)
    """Measure on the held-out data every so many steps, besides before and after."""

    sampled_only: ClassVar[frozenset[str]] = frozenset()
    """Fields that variant direct has no use for, since it samples nothing."""

    @model_validator(mode="after")
    def _nothing_unheeded(self) -> Self:
        if getattr(self, "variant", None) == DIRECT:
            fields = type(self).model_fields
            idle = [name for name in fields if name in self.sampled_only]
            idle = [
                name
                for name in idle
                if getattr(self, name)
                != fields[name].get_default(call_default_factory=True, validated_data={})
            ]
            if idle:
                raise ValueError(
                    f"variant is direct, which samples nothing and learns from the pairs of the data, so "
                    f"{' and '.join(idle)} would do nothing; leave {'it' if len(idle) == 1 else 'them'} out, "
                    "or take another variant"
                )
        return self

    @model_validator(mode="after")
    def _something_to_measure(self) -> Self:
        if self.eval_every is not None and getattr(self, "variant", DIRECT) != DIRECT:
            raise ValueError(
                "eval_every measures on held-out pairs, which variant direct alone has; leave it out"
            )
        return self

    def total_steps(self, records: int) -> int:
        """Optimizer steps for a number of records; the last batch of an epoch runs into the next."""
        return self.steps or max(1, math.ceil(self.epochs * records / self.batch_size))


def fit(
    policy: Learner,
    records: Sequence[R],
    objective: Callable[[Sequence[R], int], Objective[R]],
    cfg: PairBatches,
    run: Run,
    held_out: Sequence[R] = (),
    *,
    name: str = "pairs",
    numbers: Mapping[str, float] = MappingProxyType({}),
    measure: Callable[[], Mapping[str, float]] | None = None,
) -> None:
    """Take shuffled batches, one optimizer step each, and measure on the held-out records as asked.

    Args:
        policy: trained in place.
        records: what there is to learn from.
        objective: of a batch, given it and a seed of its own; most methods have one for all.
        cfg: batch size, passes, when to measure.
        run: one stage of it.
        held_out: measured before, after, and every `cfg.eval_every` steps.
        name: tells the shuffles of several stages apart.
        numbers: written beside every step's metrics.
        measure: what is measured, if not the objective's metrics on the held-out records.
    """
    stream = Stream(records, seed=run.seed(name))
    steps = cfg.total_steps(len(records))

    def found() -> Mapping[str, float]:
        if measure is not None:
            return measure()
        return policy.measure(held_out, objective(held_out, run.seed(name, "eval")))

    def look() -> None:
        if held_out or measure is not None:
            run.measure(name, lambda: named(found()))

    look()
    for step in run.steps(steps, policy):
        batch = stream.batch(step, cfg.batch_size)
        metrics = policy.update(batch, objective(batch, run.seed(name, step)))
        run.log(step, metrics, numbers, {"epoch": (step + 1) * cfg.batch_size / len(records)})
        if step + 1 == steps or (cfg.eval_every and (step + 1) % cfg.eval_every == 0):
            look()
    look()  # the run knows it, unless there were more steps before than now


def always(objective: Objective[R]) -> Callable[[Sequence[R], int], Objective[R]]:
    """One objective for every batch of `fit`."""
    return lambda *_: objective


def named(found: Mapping[str, float]) -> dict[str, float]:
    """Metrics of held-out records, under TRL's names."""
    return {f"eval_{name}": value for name, value in found.items()}
