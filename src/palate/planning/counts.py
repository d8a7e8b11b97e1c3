"""The counts of a run: its training, by the method's own bounds, and the measurements around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from palate.config import KLConfig, RewardConfig, Sampling
from palate.loops import LearntReward, PolicyGradients
from palate.method import Method
from palate.spending import Annotations, Rows, Spending

KL_EVERY = 10
"""Steps between measurements of the KL with `max_kl`, unless `kl_every` says otherwise."""


@dataclass(frozen=True)
class Sizes:
    """The data of a run, in rows.

    Attributes:
        rows: the rows that the method's bounds depend on.
        fitting: distinct training prompts that leave room for a completion.
        held_out: held-out prompts that policies are compared on.
        known: pairs in `probe_data`.
        ranked: answers in `judge_data`.
    """

    rows: Rows
    fitting: int
    held_out: int = 0
    known: int = 0
    ranked: int = 0


@dataclass(frozen=True)
class Measurement:
    """A measurement before, during or after training.

    Attributes:
        name: for the table.
        completions: completions sampled, one or two for each prompt.
        groups: groups for the annotator of held-out completions.
        pairs: pairs for the judge, each asked about in both orders.
        scored: completions whose log-probabilities are computed without gradient.
    """

    name: str
    completions: int = 0
    groups: tuple[Annotations, ...] = ()
    pairs: int = 0
    scored: int = 0


def training(method: Method, cfg: Any, rows: Rows) -> Spending:
    """Return the upper bounds of a run's training."""
    spends = method.way_of(cfg).spends
    assert spends is not None, "every way declares its spending"
    return spends(cfg, rows)


def measurements(method: Method, cfg: Any, spending: Spending, sizes: Sizes) -> tuple[Measurement, ...]:
    """Return upper bounds of what a run measures besides training, without measurements that it does not do.

    Args:
        method, cfg: the method and its configuration.
        spending: the bounds of training.
        sizes: the run's data.
    """
    every = (
        _compared(method, cfg, sizes),
        _fresh(method, cfg, sizes),
        _kl(method, cfg, spending, sizes),
        _probe(method, cfg, sizes),
        _of_judge(cfg, sizes),
        _of_records(method, cfg, spending, sizes),
    )
    return tuple(one for one in every if one is not None)


def is_annotated(cfg: Any) -> bool:
    """Return True if the configuration names a reward or a judge."""
    return isinstance(cfg, RewardConfig) and bool(cfg.reward or cfg.judge)


def compares(cfg: Any) -> bool:
    """Return True if the judge of the configuration compares two completions; see `palate.run.judging`."""
    if getattr(cfg, "judge", None) is None:
        return False
    one_score = getattr(cfg, "n", 2) == 1 or getattr(cfg, "compares_rewards", None) is not None
    mode = cfg.judge_mode or ("score" if one_score and not cfg.compares_pairs else "pairwise")
    return bool(mode == "pairwise")


def samples(method: Method, cfg: Any) -> bool:
    """Return True for a run whose learner can complete prompts."""
    return method.learner is None and isinstance(cfg, Sampling)


def each_comparison(cfg: Any, prompts: int) -> tuple[int, int]:
    """Return the completions sampled, and those scored, in one comparison of two policies."""
    extra = 0 if cfg.held_out_sampling == cfg.unrestricted else prompts
    return 2 * prompts + extra, 2 * prompts


def _compared(method: Method, cfg: Any, sizes: Sizes) -> Measurement | None:
    if not (sizes.held_out and is_annotated(cfg) and samples(method, cfg)):
        return None
    completions, scored = each_comparison(cfg, sizes.held_out)
    groups = (Annotations(sizes.held_out, 2),)
    return Measurement("held-out prompts, before and after", completions, groups, scored=scored)


def _fresh(method: Method, cfg: Any, sizes: Sizes) -> Measurement | None:
    """Fresh samples, unless they are those of the held-out comparison or every step has its own."""
    if not samples(method, cfg) or method.recipe.judged == "each step":
        return None
    if sizes.held_out and is_annotated(cfg):
        return None
    count = 2 * min(cfg.fresh_prompts, sizes.held_out or sizes.fitting)
    return Measurement("fresh prompts, before and after", count) if count else None


def _kl(method: Method, cfg: Any, spending: Spending, sizes: Sizes) -> Measurement | None:
    if not isinstance(cfg, KLConfig) or not samples(method, cfg):
        return None
    every = cfg.kl_every or (KL_EVERY if cfg.max_kl is not None else None)
    if every is None:
        return None
    times = steps_of_run(cfg, spending) // every + (_stages(cfg) if cfg.max_kl is not None else 0)
    count = times * min(cfg.kl_prompts, sizes.fitting)
    return Measurement("KL during training", count, scored=2 * count)


def _probe(method: Method, cfg: Any, sizes: Sizes) -> Measurement | None:
    if method.way_of(cfg).learns_from != "prompts" or not compares(cfg) or not cfg.probe_pairs:
        return None
    own = min(cfg.probe_pairs, sizes.fitting)
    return Measurement("test of the judge", 2 * own, pairs=own + min(cfg.probe_pairs, sizes.known))


def _of_judge(cfg: Any, sizes: Sizes) -> Measurement | None:
    if not sizes.ranked:
        return None
    times = cfg.rounds + 1 + (sizes.rows.others > 0)
    return Measurement("the judge on ranked answers", groups=(Annotations(times * sizes.ranked, 1),))


def _of_records(method: Method, cfg: Any, spending: Spending, sizes: Sizes) -> Measurement | None:
    """Held-out records, which cost forward passes only."""
    if method.way_of(cfg).learns_from == "prompts" or not sizes.rows.held_out:
        return None
    every = getattr(cfg, "eval_every", None)
    times = 2 * getattr(cfg, "rounds", 1) + (0 if every is None else spending.steps // every)
    each = 2 * sizes.rows.held_out
    return Measurement("held-out records", scored=times * each + (each if spending.referenced else 0))


def steps_of_run(cfg: Any, spending: Spending) -> int:
    """Return the steps that the run counts: a rollout phase is one, whatever its optimizer steps."""
    if isinstance(cfg, PolicyGradients):
        return spending.steps - cfg.steps * (cfg.updates - 1)
    return spending.steps


def _stages(cfg: Any) -> int:
    """Return the most stages of training, after each of which a bound on the KL is checked."""
    each = max(1, len(getattr(cfg, "thresholds", ())))
    return int(getattr(cfg, "rounds", 1)) * each + 1 + isinstance(cfg, LearntReward)


def critics_of(cfg: Any) -> int:
    """Return the number of further trained models beside the policy: a value function, a reward model."""
    return (getattr(cfg, "estimator", "") == "gae") + isinstance(cfg, LearntReward)
