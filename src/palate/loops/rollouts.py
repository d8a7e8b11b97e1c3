"""A phase of policy gradients: rollouts from scored completions, and the optimizer steps on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from palate.advantages import (
    Divergence,
    discounted_returns,
    divergence,
    explained_variance,
    gae,
    leave_one_out,
    shaped_rewards,
    whiten,
)
from palate.data import Stream
from palate.learn import Learner, Policy, PolicyGradient, Reference, Rollout, ValueRegression
from palate.loops.report import sample_numbers
from palate.loops.rl_config import PolicyGradients
from palate.model import TokenValues, ragged
from palate.run import Run
from palate.types import Example, Group

OF_CRITIC = {
    "grad_norm": "value/grad_norm",
    "learning_rate": "value/learning_rate",
    "skipped_updates": "value/skipped_updates",
}
"""Metric names of the value function's optimizer."""

LAST = frozenset({"learning_rate", "value/learning_rate", "skipped_updates", "value/skipped_updates"})
"""Metrics of a phase that report the last value, not the mean."""


def usable(groups: Sequence[Group], cfg: PolicyGradients) -> tuple[list[Group], dict[str, float]]:
    """Return the completions that have a reward, and the metrics of all of them.

    Completions without a usable reward are dropped, and so are those that `rloo` cannot compare with others.

    Args:
        groups: groups with rewards.
        cfg: the method's configuration.
    """
    fewest = 2 if cfg.estimator == "rloo" else 1
    kept = []
    for group in groups:
        assert group.rewards is not None
        known = [(c, r) for c, r in zip(group.completions, group.rewards, strict=True) if r is not None]
        if len(known) >= fewest:
            completions, rewards = zip(*known, strict=True)
            kept.append(replace(group, completions=completions, rewards=rewards))
    total, used = (sum(len(g.completions) for g in part) for part in (groups, kept))
    return kept, {**sample_numbers(groups), "rollouts/kept": used, "rollouts/dropped": total - used}


def roll_out(
    policy: Policy,
    critic: Learner | None,
    ref: Reference,
    groups: Sequence[Group],
    cfg: PolicyGradients,
    run: Run,
    *,
    step: int,
    beta: float,
    centre: float,
) -> tuple[list[Rollout], dict[str, float]]:
    """Compute log-probabilities, values and advantages of completions before the optimizer steps on them.

    The learner computes the log-probabilities, not the sampler, in the mini-batches of the first pass. So the
    first optimizer step begins with a ratio of exactly 1 for every token.

    Args:
        policy: the policy that sampled the completions.
        critic: the value function; None for an estimator without one.
        ref: the reference of the KL penalty.
        groups: groups with a reward for every completion.
        cfg, run: the method's configuration and its run.
        step: the step of the run.
        beta: the penalty for a nat of KL.
        centre: subtracted from every reward.

    Returns:
        The rollouts in the order of the groups, and the metrics of the phase.
    """
    by_group: dict[int, list[tuple[Tensor, ...]]] = {}
    for part in _parts(len(groups), cfg, run, step, 0):
        own = [groups[i] for i in part]
        logps, ref_logps = policy.logps(own), ref.logps(own)
        values = (
            TokenValues(torch.zeros_like(logps.values), logps.mask) if critic is None else critic.values(own)
        )
        rows = zip(*(_cpu(t).rows() for t in (logps, ref_logps, values)), strict=True)
        by_group |= {i: [next(rows) for _ in groups[i].completions] for i in part}
    logps, ref_logps, values = (
        ragged([row[k] for i in range(len(groups)) for row in by_group[i]]) for k in range(3)
    )
    mask = logps.mask
    kl = divergence(logps.values, ref_logps.values, mask)
    scores = torch.tensor([r for group in groups for r in group.rewards or ()]) - centre
    rewards = shaped_rewards(scores, kl.k1, mask, beta=beta)
    advantages, returns = _advantages(rewards, values.values, mask, [len(g.completions) for g in groups], cfg)
    weights: dict[str, float] = {}
    if cfg.off_policy:
        importance, weights = importance_weights(logps.values, mask, groups, cap=cfg.importance_cap)
        advantages = advantages * importance
    columns = [iter(TokenValues(t, mask).rows()) for t in (logps.values, advantages, values.values, returns)]
    rollouts = [
        Rollout(g.prompt, g.completions, *(tuple(next(c) for _ in g.completions) for c in columns))
        for g in groups
    ]
    numbers = _numbers(scores, rewards, kl, values.values, returns, mask, critic is not None)
    return rollouts, numbers | weights


def importance_weights(
    logps: Tensor, mask: Tensor, groups: Sequence[Group], *, cap: float
) -> tuple[Tensor, dict[str, float]]:
    """Return truncated importance weights of tokens that another policy has sampled: min(cap, pi / mu).

    A token's term in the loss of PPO is multiplied by its weight, which has no gradient (Espeholt et al.
    2018, arXiv:1802.01561; Hilton et al. 2021, arXiv:2110.00641). The ratio that PPO clips stays that of the
    phase.

    Args:
        logps: log pi, under the policy at the start of the phase. (N, T)
        mask: the tokens. (N, T)
        groups: the completions, with log mu, under the policy that sampled them.
        cap: the largest weight.

    Returns:
        The weights (N, T), 0 outside the mask, and their metrics.
    """
    sampled = ragged([torch.tensor(c.logps or ()) for group in groups for c in group.completions]).values
    difference = torch.where(mask, logps - sampled.to(logps.dtype), 0)
    weights = torch.where(mask, difference.exp().clamp(max=cap), 0)
    own = weights[mask]
    return weights, {
        "rollouts/weight": float(own.mean()),
        "rollouts/weight_capped": float((own >= cap).float().mean()),
        "rollouts/logp_difference": float(difference[mask].abs().mean()),
    }


def learn_phase(
    policy: Policy,
    critic: Learner | None,
    rollouts: Sequence[Rollout],
    texts: Stream[Example] | None,
    cfg: PolicyGradients,
    run: Run,
    *,
    step: int,
) -> dict[str, float]:
    """Take the optimizer steps of a phase: several passes in mini-batches, the value function before the
    policy.

    Returns:
        Means of the metrics of all optimizer steps, the sum of `num_tokens`, and the last learning rate.
        Metrics of the value function have the prefix `value/`.
    """
    seen: defaultdict[str, list[float]] = defaultdict(list)
    count = step * cfg.updates
    for epoch in range(cfg.ppo_epochs):
        for part in _parts(len(rollouts), cfg, run, step, epoch):
            own = [rollouts[i] for i in part]
            if critic is not None:
                numbers = critic.update(own, ValueRegression.of(own, clip=cfg.value_clip or None))
                kept = {name: v for name, v in numbers.items() if "/" in name}
                others = {named: numbers[name] for name, named in OF_CRITIC.items() if name in numbers}
                _note(seen, {**kept, **others})
            if step >= cfg.value_warmup or critic is None:
                records = [*own, *(texts.batch(count, cfg.pretrain_batch_size) if texts else ())]
                clip = None if cfg.estimator == "reinforce" else cfg.clip
                objective = PolicyGradient.of(records, clip=clip, pretrain_coef=cfg.pretrain_coef)
                _note(seen, policy.update(records, objective))
            count += 1
    means = {name: values[-1] if name in LAST else sum(values) / len(values) for name, values in seen.items()}
    if "num_tokens" in seen:
        means["num_tokens"] = sum(seen["num_tokens"])
    return means


def _note(seen: defaultdict[str, list[float]], metrics: dict[str, float]) -> None:
    for name, value in metrics.items():
        seen[name].append(value)


def _parts(count: int, cfg: PolicyGradients, run: Run, step: int, epoch: int) -> Iterator[list[int]]:
    """Yield the indices of the mini-batches of a pass, shuffled, of sizes that differ by one at most."""
    order = Stream(range(count), seed=run.seed("mini-batches", step, epoch)).batch(0, count)
    parts = min(count, cfg.mini_batches)
    for i in range(parts):
        yield order[i * count // parts : (i + 1) * count // parts]


def _advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, sizes: Sequence[int], cfg: PolicyGradients
) -> tuple[Tensor, Tensor]:
    """Return advantages and returns by the estimator. (N, T) each; `sizes` are the groups' completions."""
    if cfg.estimator == "gae":
        advantages, returns = gae(rewards, values, mask, gamma=cfg.gamma, lam=cfg.lam)
    elif cfg.estimator == "reinforce":
        advantages = returns = discounted_returns(rewards, mask, gamma=cfg.gamma)
    else:
        groups = ragged(torch.split(rewards.sum(-1), list(sizes)))
        of_completions = leave_one_out(groups.values, groups.mask)[groups.mask]
        advantages = returns = torch.where(mask, of_completions[:, None], 0)
    return whiten(advantages, mask) if cfg.whiten else advantages, returns


def _numbers(
    scores: Tensor,
    rewards: Tensor,
    kl: Divergence,
    values: Tensor,
    returns: Tensor,
    mask: Tensor,
    has_values: bool,
) -> dict[str, float]:
    """Return the metrics of rollouts, per completion; KL in nats."""
    numbers = {
        "objective/kl": float(kl.k1.sum(-1).mean()),
        "objective/kl_k3": float(kl.k3.sum(-1).mean()),
        "objective/centred_scores": float(scores.mean()),
        "objective/non_score_reward": float((rewards.sum(-1) - scores).mean()),
        "objective/rlhf_reward": float(rewards.sum(-1).mean()),
    }
    explained = explained_variance(values, returns, mask) if has_values else None
    return numbers if explained is None else {**numbers, "val/explained_variance": explained}


def _cpu(values: TokenValues) -> TokenValues:
    return TokenValues(values.values.cpu(), values.mask.cpu())
