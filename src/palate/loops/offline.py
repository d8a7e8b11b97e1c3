"""The loop of methods that learn from a fixed set of records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from palate.data import Stream
from palate.learn import Learner, Objective
from palate.loops.config import Batches, PairBatches
from palate.run import Run
from palate.types import Record

R = TypeVar("R", bound=Record)


def fit(
    policy: Learner,
    records: Sequence[R],
    objective: Callable[[Sequence[R], int], Objective[R]],
    cfg: Batches,
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
    every = cfg.eval_every if isinstance(cfg, PairBatches) else None
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
        if step + 1 == steps or (every and (step + 1) % every == 0):
            look()
    look()  # the run knows it, unless there were more steps before than now


def always(objective: Objective[R]) -> Callable[[Sequence[R], int], Objective[R]]:
    """One objective for every batch of `fit`."""
    return lambda *_: objective


def named(found: Mapping[str, float]) -> dict[str, float]:
    """Metrics of held-out records, under TRL's names."""
    return {f"eval_{name}": value for name, value in found.items()}
