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
        records: the records to learn from.
        objective: returns the objective of a batch from the batch and a seed; most methods use a constant.
        cfg: batch size and passes; `PairBatches` also has the steps between measurements.
        run: the run; the fit is one of its stages.
        held_out: measured before training, after training, and every `cfg.eval_every` steps.
        name: name of the stage, which seeds its shuffles.
        numbers: logged with every step's metrics.
        measure: replaces the measurement of the objective's metrics on the held-out records.
    """
    every = cfg.eval_every if isinstance(cfg, PairBatches) else None
    stream = Stream(records, seed=run.seed(name))
    steps = cfg.total_steps(len(records))

    def metrics_now() -> Mapping[str, float]:
        if measure is not None:
            return measure()
        return policy.measure(held_out, objective(held_out, run.seed(name, "eval")))

    def evaluate() -> None:
        if held_out or measure is not None:
            run.measure(name, lambda: named(metrics_now()))

    evaluate()
    try:
        for step in run.steps(steps, policy):
            batch = stream.batch(step, cfg.batch_size)
            metrics = policy.update(batch, objective(batch, run.seed(name, step)))
            run.log(step, metrics, numbers, {"epoch": (step + 1) * cfg.batch_size / len(records)})
            if step + 1 == steps or (every and (step + 1) % every == 0):
                evaluate()
    except BoundReachedError:
        evaluate()  # at the weights that training ends with
        raise
    evaluate()  # only has an effect if a run is resumed with fewer steps, so that its loop is empty


def always(objective: Objective[R]) -> Callable[[Sequence[R], int], Objective[R]]:
    """Return one objective for every batch of `fit`."""
    return lambda *_: objective


def named(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics of held-out records under TRL's names."""
    return {f"eval_{name}": value for name, value in metrics.items()}
