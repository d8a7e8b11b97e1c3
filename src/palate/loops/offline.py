"""The loop over a fixed set of records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from palate.data import Stream
from palate.learn import Learner, Objective
from palate.loops.config import Batches, PairBatches
from palate.run import BoundReachedError, Run
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
    """Take one optimizer step on each shuffled batch, and measure on the held-out records.

    Args:
        policy: trained in place.
        records: to learn from.
        objective: gives the objective of a batch, from the batch and a seed; most methods use one for all.
        cfg: batch size and passes; of `PairBatches`, also the steps between measurements.
        run: the run that this is one stage of.
        held_out: measured before, after, and every `cfg.eval_every` steps.
        name: name of the stage, which seeds its shuffles.
        numbers: logged with every step's metrics.
        measure: gives the measurement, instead of the objective's metrics on the held-out records.
    """
    every = cfg.eval_every if isinstance(cfg, PairBatches) else None
    stream = Stream(records, seed=run.seed(name))
    steps = cfg.total_steps(len(records))

    def metrics_now() -> Mapping[str, float]:
        if measure is not None:
            return measure()
        return policy.measure(held_out, objective(held_out, run.seed(name, "eval")))

    def look() -> None:
        if held_out or measure is not None:
            run.measure(name, lambda: named(metrics_now()))

    look()
    try:
        for step in run.steps(steps, policy):
            batch = stream.batch(step, cfg.batch_size)
            metrics = policy.update(batch, objective(batch, run.seed(name, step)))
            run.log(step, metrics, numbers, {"epoch": (step + 1) * cfg.batch_size / len(records)})
            if step + 1 == steps or (every and (step + 1) % every == 0):
                look()
    except BoundReachedError:
        look()  # at the weights that training ends with
        raise
    look()  # for a run resumed with fewer steps, whose loop is empty; any other has this measurement already


def always(objective: Objective[R]) -> Callable[[Sequence[R], int], Objective[R]]:
    """Return one objective for every batch of `fit`."""
    return lambda *_: objective


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics of held-out records under TRL's names."""
    return {f"eval_{name}": value for name, value in metrics.items()}
