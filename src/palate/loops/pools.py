"""Candidates and their rewards from a pool, in place of sampling and annotating."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from palate.annotate import Annotator
from palate.config import Sampling
from palate.learn import Policy
from palate.loops.stage import annotated_samples
from palate.pool import Pool, read_facts
from palate.pool.facts import LOCAL
from palate.run import Run
from palate.types import Group, Prompt

BILL = "the pool's bill"
"""Name of the fact in a run's journal: the cost of the candidates that it read from a pool."""


def open_pool(policy: Policy, cfg: Any, run: Run, *, n: int, sampling: Sampling) -> Pool | None:
    """Return the pool that a method's configuration names, after a check that it fits; None without a pool.

    Call it at the start of a method, where the policy has the weights that the pool was sampled from.

    Args:
        policy, cfg, run: of the method.
        n: number of completions of each prompt that the method needs.
        sampling: the options of the method's first draw.

    Raises:
        ConfigError: the directory holds no finished pool, or the pool was made with other settings.
        RunError: the run started with another pool.
    """
    if cfg.pool is None:
        return None
    pool = Pool(cfg.pool)
    pool.require(policy.model, sampling, n, cfg)
    run.require_same("the pool", pool.facts.id, str(pool))
    policy.served = pool.facts.engine_kind != LOCAL
    return pool


def groups_of_pool(pool: Pool, policy: Policy, prompts: Sequence[Prompt], n: int, run: Run) -> list[Group]:
    """Return the first n completions of each prompt from a pool, and put their cost on the run's bill.

    Raises:
        ConfigError: the pool lacks a prompt.
        DataError: no prompt has completions, or the policy's template gives other tokens.
    """
    groups = pool.groups(prompts, n, policy.model.codec, run.display.say)
    run.remember(BILL, json.dumps(pool.bill()))
    return groups


def scored_by(annotate: Annotator, pool: Pool | None) -> Annotator:
    """Return an annotator that takes the rewards of a pool's completions from the pool."""
    return annotate if pool is None else pool.annotator(annotate)


def scored_draw(
    policy: Policy,
    annotate: Annotator,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    run: Run,
    round_: int,
    pool: Pool | None,
) -> list[Group]:
    """Sample n completions of each prompt and annotate them; the first round may come from a pool.

    Args:
        policy, annotate, run: of the method.
        prompts, n, sampling: as in `Snapshot.sample`.
        round_: number of the round, from 0.
        pool: the source of round 0.
    """
    source = pool if round_ == 0 else None
    policy.served = source is not None and source.facts.engine_kind != LOCAL
    if source is not None:
        return scored_by(annotate, source)(groups_of_pool(source, policy, prompts, n, run))
    seed = run.seed("sample", round_)
    return annotated_samples(policy.snapshot(), annotate, prompts, n, sampling, seed=seed)


def pool_date(cfg: Any) -> str | None:
    """Return the date on which a pool began, for chat templates that print it; None without a pool."""
    pool = getattr(cfg, "pool", None)
    return None if pool is None else read_facts(pool).date


def pool_bill(run: Run) -> dict[str, float]:
    """Return the cost of the candidates that a run read from a pool, by name; nothing without a pool."""
    stored = run.remember(BILL, "{}") if getattr(run.cfg, "pool", None) else "{}"
    return dict(json.loads(stored))
