"""The engine that samples a run's completions, from its configuration."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from palate.config import Rollouts
from palate.learn import Learner, Policy
from palate.run import Run

FACT = "the engine of the samples"


def open_rollouts(learner: Learner, cfg: Any, run: Run) -> None:
    """Let a server sample the policy's completions, if the configuration names one.

    The size of chunks is fixed. A run keeps its kind of engine; the server may move or get another version.

    Args:
        learner: the run's model.
        cfg, run: the run.

    Raises:
        ConfigError, RunError: the server cannot be used, or the run started with another kind of engine.
    """
    if not isinstance(cfg, Rollouts) or not isinstance(learner, Policy):
        return
    run.require_same(FACT, cfg.rollouts.partition(":")[0], f"{FACT} (--rollouts)")
    learner.model.chunk_rows = int(run.remember("the rows of a chunk", str(cfg.sampling_rows or 0)))
    if cfg.rollouts == "local":
        return
    from palate.model.served.connect import connected  # loads an HTTP client

    remember = partial(run.remember, f"the version of {FACT}")
    learner.model.sampler = connected(
        cfg, learner.model, run.directory, remember=remember, say=run.display.say
    )


@contextmanager
def closing_rollouts(run: Run) -> Iterator[None]:
    """End the servers of a run's learners at the end."""
    try:
        yield
    finally:
        for learner in run.learners:
            if learner.model.sampler is not None:
                learner.model.sampler.close()
                learner.model.sampler = None
