"""The numbers of an evaluation, from annotated completions. Rates are in [0, 1]; KL is in nats."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from palate.evaluation.config import Scale
from palate.evaluation.sides import Side
from palate.statistics import rate_interval
from palate.textstats import distinct, repetition
from palate.types import Completion, Group
from palate.winrates import Verdict, length_controlled, standard_error

INTERVAL = 1.96
"""Standard errors in half of a 95 % interval of a mean."""


def text_numbers(side: Side) -> dict[str, float]:
    """Return the statistics of a side's texts, and its perplexity on the user's own text if measured."""
    completions = [c for group in side.groups for c in group.completions]
    tokens = [c.token_ids for c in completions]
    numbers = {
        "tokens": _mean([float(len(ids)) for ids in tokens]),
        "characters": _mean([float(len(c.text)) for c in completions]),
        "ended": _mean([float(c.finish != "length") for c in completions]),
        **{f"distinct_{n}": distinct(tokens, n) for n in (1, 2, 3)},
        "repetition": repetition(tokens),
    }
    if side.text_logps is not None:
        numbers |= {"perplexity": side.perplexity}
    return numbers | ({"text_truncated": side.text_truncated} if side.text_truncated else {})


def preferences(groups: Sequence[Group], n: int) -> list[list[float | None]]:
    """Return P(model preferred) of each pair of each prompt.

    Args:
        groups: for each pair, in the order prompt by prompt: the baseline's completion, then the model's,
            with rewards. The higher reward wins; equal rewards are a tie.
        n: pairs of a prompt.
    """
    outcomes = [_outcome(*(group.rewards or (None, None))) for group in groups]
    return [outcomes[i : i + n] for i in range(0, len(outcomes), n)]


def win_numbers(groups: Sequence[Group], n: int, *, scale: Scale) -> dict[str, float]:
    """Return the win rate of a model over the baseline, with its errors, and the length-controlled one.

    Args:
        groups, n: as in `preferences`.
        scale: the meaning of the rewards. The length-controlled rate uses the probability of winning if the
            rewards express one, and the outcome for scores.
    """
    by_prompt = preferences(groups, n)
    # Rows that repeat a prompt are one cluster: the prompts are the sample, and the rows are not independent.
    clusters = [group.prompt.id for group in groups]
    every = [o for own in by_prompt for o in own]
    outcomes = [(key, o) for key, o in zip(clusters, every, strict=True) if o is not None]
    won = [o for _, o in outcomes]
    rate, low, high, _ = rate_interval(won, [key for key, _ in outcomes])
    numbers = {
        "win_rate": rate,
        "win_rate_low": low,
        "win_rate_high": high,
        "standard_error": standard_error(_by_prompt(groups, every)),
        "wins": sum(o == 1 for o in won),
        "ties": sum(o == 0.5 for o in won),
        "losses": sum(o == 0 for o in won),
        "unusable": sum(o is None for own in by_prompt for o in own),
    }
    verdicts = [(group.prompt.id, v) for group in groups if (v := _verdict(group, scale)) is not None]
    if verdicts:
        controlled = length_controlled([v for _, v in verdicts], [prompt for prompt, _ in verdicts])
        numbers |= {
            "length_controlled_win_rate": controlled.rate,
            "length_controlled_standard_error": controlled.standard_error,
            "length_controlled_low": controlled.low,
            "length_controlled_high": controlled.high,
        }
    return numbers


def reward_numbers(groups: Sequence[Group], place: int, prefix: str = "reward") -> dict[str, float]:
    """Return the mean reward of the completion at a place of each group, with its standard error."""
    given = [(group.rewards or ())[place] for group in groups]
    error = standard_error(_by_prompt(groups, given))
    return {prefix: _mean([r for r in given if r is not None]), f"{prefix}_standard_error": error}


def kl_numbers(side: Side, ref_logps: Sequence[float]) -> dict[str, float]:
    """Return the estimate of KL(model || baseline) per completion, with its standard error."""
    ratios = [a - b for a, b in zip(side.own_logps, ref_logps, strict=True)]
    return {"kl": _mean(ratios), "kl_standard_error": standard_error(ratios)}


def best_numbers(groups: Sequence[Group], names: Sequence[str]) -> list[dict[str, Any]]:
    """Return for each of k sides: the share of prompts where its completion has the best reward.

    Args:
        groups: the k completions of a prompt with rewards; sides that share the best reward share the choice.
        names: the sides, in the order of the completions.
    """
    rows = []
    usable = [group for group in groups if None not in (group.rewards or (None,))]
    for place, name in enumerate(names):
        shares, scores = [], []
        for group in usable:
            rewards = [float(r or 0.0) for r in group.rewards or ()]
            best = max(rewards)
            shares.append((rewards[place] == best) / rewards.count(best))
            scores.append(rewards[place])
        rate, low, high, _ = rate_interval(shares, [group.prompt.id for group in usable])
        rows.append(
            {"name": name, "best": rate, "best_low": low, "best_high": high}
            | {"score": _mean(scores), "score_standard_error": standard_error(scores), "prompts": len(usable)}
        )
    return rows


def finite(value: Any) -> Any:
    """Return the value with None for numbers that JSON cannot express."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    return [finite(v) for v in value] if isinstance(value, list | tuple) else value


def _by_prompt(groups: Sequence[Group], values: Sequence[float | None]) -> list[float]:
    """Return the mean value of each prompt that has one."""
    own: dict[str, list[float]] = {}
    for group, value in zip(groups, values, strict=True):
        if value is not None:
            own.setdefault(group.prompt.id, []).append(value)
    return [_mean(several) for several in own.values()]


def _outcome(baseline: float | None, model: float | None) -> float | None:
    return None if baseline is None or model is None else 0.5 * ((model > baseline) + (model >= baseline))


def _verdict(group: Group, scale: Scale) -> Verdict | None:
    old, new = group.rewards or (None, None)
    outcome = _outcome(old, new)
    if outcome is None or old is None or new is None:
        return None
    baseline, model = group.completions
    chances = {
        "score": outcome,
        "probability": _clamped((1 + new - old) / 2),
        "log-odds": _sigmoid(new - old),
    }
    return Verdict(chances[scale], _length(model), _length(baseline))


def _clamped(p: float) -> float:
    """Return p in [0, 1]: penalties move the rewards p and 1 - p, and their difference beyond 1."""
    return min(1.0, max(0.0, p))


def _sigmoid(odds: float) -> float:
    """Return the probability of log-odds, without overflow."""
    return 0.5 * (1.0 + math.tanh(odds / 2))


def _length(completion: Completion) -> float:
    return float(len(completion.text))


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan
