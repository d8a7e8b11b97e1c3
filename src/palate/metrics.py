"""The metrics that runs log, by name. The live display, `palate runs` and reports use the labels given here.

Names follow TRL where TRL has the metric. Measurements on held-out data have the same names with the prefix
`eval_`. A method may log other names as well; a report draws them under their own names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HELD_OUT = "eval_"
"""Prefix of measurements on held-out data."""

PART = "objective/scores/"
"""Prefix of the parts of a reward that is a weighted sum."""

DROPPED = "pairs/dropped_"
"""Prefix of the counts of groups that gave no pair, by reason."""

STAGES = {"sample": "sampling", "annotate": "scoring", "learn": "learning", "evaluate": "measuring"}
"""Stages of a step and their labels. A run logs the seconds of a stage as, for example, `time/sample`."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        label: a few words for readers.
        of_samples: True if it measures freshly sampled completions. If several steps learn from the same
            samples, it has one value for all of these steps.
        drawn: False if reports leave it out of "Further metrics": it has no plot, or is part of another.
    """

    label: str
    of_samples: bool = False
    drawn: bool = True


def _samples(label: str) -> Metric:
    return Metric(label, of_samples=True)


METRICS: Mapping[str, Metric] = {
    # Rewards and selection.
    "objective/scores": _samples("reward"),
    "objective/scores_std": _samples("reward std"),
    "objective/scores_margin": _samples("best - worst"),
    "objective/unusable": _samples("unusable rewards"),
    "objective/kl": Metric("KL (nats)"),
    "objective/kl_k3": Metric("KL, never negative (nats)"),
    "objective/centred_scores": _samples("reward less its mean at the start"),
    "objective/non_score_reward": Metric("KL penalty"),
    "objective/rlhf_reward": Metric("reward with the KL penalty"),
    "rollouts/kept": _samples("completions learnt from"),
    "rollouts/dropped": _samples("completions without a usable reward"),
    "rollouts/weight": _samples("importance weight"),
    "rollouts/weight_capped": _samples("importance weights at their cap"),
    "rollouts/logp_difference": _samples("difference to the policy that sampled (nats)"),
    "kl/fresh": Metric("KL of fresh samples (nats)"),
    "frac_reward_zero_std": _samples("share of groups with equal rewards"),
    "pairs/kept": _samples("pairs"),
    "pairs/dropped": _samples("dropped"),
    "candidates/kept": _samples("candidates kept"),
    "candidates/dropped": _samples("candidates dropped"),
    "candidates/scores": _samples("reward of candidates kept"),
    "completions/kept": Metric("completions kept"),
    "pool/size": _samples("pool size"),
    "pool/scores": _samples("reward of the pool"),
    "threshold": Metric("threshold"),
    # Samples.
    "completions/mean_length": _samples("mean tokens"),
    "completions/min_length": _samples("fewest tokens"),
    "completions/max_length": _samples("most tokens"),
    "completions/mean_terminated_length": _samples("mean tokens, if ended"),
    "completions/clipped_ratio": _samples("truncated"),
    "val/contain_eos_token": _samples("ended"),
    "logps/fresh": _samples("log-probability of own completions"),
    "sampling/sampling_logp_difference/mean": _samples("sampler-learner difference"),
    "sampling/sampling_logp_difference/max": _samples("largest sampler-learner difference"),
    "sampling/tokens_per_second": Metric("tokens per second"),
    # The judge: what it said in this step, and what it has taken since the run began.
    "judge/unusable": Metric("unusable verdicts", drawn=False),
    "judge/orders_disagree": Metric("one place wins in both orders", drawn=False),
    "judge/members_disagree": Metric("members of the panel disagree", drawn=False),
    "judge/expert_asked": Metric("questions that the expert gets"),
    "judge/probe_pairs": Metric("pairs of the judge's test", drawn=False),
    "judge/probe_unusable": Metric("unusable verdicts in the judge's test", drawn=False),
    "judge/probe_orders_disagree": Metric("one place wins in both orders, in the judge's test", drawn=False),
    "judge/probe_first_share": Metric("the first place wins, in the judge's test", drawn=False),
    "judge/probe_certainty": Metric("distance of P from one half, in the judge's test", drawn=False),
    "judge/probe_accuracy": Metric("accuracy in the judge's test", drawn=False),
    "judge/probe_accuracy_low": Metric("accuracy in the judge's test, low end", drawn=False),
    "judge/probe_accuracy_high": Metric("accuracy in the judge's test, high end", drawn=False),
    "judge/pairwise": Metric("the judge's pairwise accuracy"),
    "judge/pairwise_low": Metric("the judge's pairwise accuracy, low end of its interval", drawn=False),
    "judge/pairwise_high": Metric("the judge's pairwise accuracy, high end of its interval", drawn=False),
    "judge/pairwise_strict": Metric("the judge's pairwise accuracy, ties wrong"),
    "judge/ties": Metric("pairs that the judge ties"),
    "judge/unclear": Metric("pairs without a clear score"),
    "judge/exact": Metric("prompts ordered wholly as people do"),
    "judge/best": Metric("answers with the highest score that people rank first"),
    "judge/spearman": Metric("Spearman's correlation of the judge"),
    "judge/kendall": Metric("Kendall's tau-b of the judge"),
    "judge/uncorrelated": Metric("prompts without a correlation", drawn=False),
    "judge/pairs": Metric("ranked pairs", drawn=False),
    "judge/mean": Metric("the judge's mean score of the same answers"),
    "meta/disputed": Metric("answers with different scores"),
    "meta/pairs": Metric("pairs of gradings"),
    "meta/first_wins": Metric("battles of gradings that the first wins"),
    "meta/unusable": Metric("battles of gradings without a usable verdict"),
    # A round against the one before, on held-out prompts.
    "round_reward": Metric("reward after a round"),
    "round_reward_before": Metric("reward before a round", drawn=False),
    "round_win_rate": Metric("win rate over the round before"),
    "round_win_rate_low": Metric("win rate over the round before, low end of its interval", drawn=False),
    "round_win_rate_high": Metric("win rate over the round before, high end of its interval", drawn=False),
    "round_kl": Metric("KL of a round to the one before (nats)"),
    "round_length": Metric("mean tokens after a round"),
    "round_length_before": Metric("mean tokens before a round", drawn=False),
    "judge/verdicts": Metric("verdicts"),
    "judge/tokens": Metric("judge's tokens"),
    "judge/cost": Metric("judge ($)", drawn=False),
    # Learning.
    "loss": Metric("loss"),
    "rank_loss": Metric("ranking loss"),
    "nll_loss": Metric("NLL loss"),
    "cringe_loss": Metric("Cringe loss"),
    "gate": Metric("gate"),
    "grad_norm": Metric("grad norm"),
    "learning_rate": Metric("learning rate"),
    "entropy": Metric("entropy"),
    "mean_token_accuracy": Metric("token accuracy"),
    "skipped_updates": Metric("skipped updates"),
    "rewards/chosen": Metric("implicit reward of chosen"),
    "rewards/rejected": Metric("implicit reward of rejected"),
    "rewards/margins": Metric("margin"),
    "rewards/accuracies": Metric("accuracy"),
    "rewards/accuracies_low": Metric("accuracy, low end of its interval", drawn=False),
    "rewards/accuracies_high": Metric("accuracy, high end of its interval", drawn=False),
    "logps/chosen": Metric("log-probability of chosen"),
    "logps/rejected": Metric("log-probability of rejected"),
    "logps/completion": Metric("log-probability of completions"),
    "logps/anchor": Metric("log-probability of the anchor"),
    "logps/training": Metric("log-probability of training texts"),
    # Policy gradients.
    "loss/policy_avg": Metric("loss of the policy"),
    "loss/value_avg": Metric("loss of the value function"),
    "policy/clipfrac_avg": Metric("tokens clipped"),
    "policy/approxkl_avg": Metric("KL within the step (nats per token)"),
    "policy/entropy_avg": Metric("entropy of own tokens"),
    "val/ratio": Metric("probability ratio"),
    "val/clipfrac_avg": Metric("values clipped"),
    "val/explained_variance": Metric("explained variance"),
    "value/grad_norm": Metric("grad norm of the value function", drawn=False),
    "value/learning_rate": Metric("learning rate of the value function", drawn=False),
    "value/skipped_updates": Metric("skipped updates of the value function", drawn=False),
    # Reward models.
    "accuracy": Metric("accuracy"),
    "margin": Metric("margin"),
    "mean_reward": Metric("mean reward"),
    "min_reward": Metric("lower reward"),
    "max_reward": Metric("higher reward"),
    # RLAIF: the soft labels of its first stage, and its reward model.
    "preferences/kept": Metric("pairs with a soft label"),
    "preferences/dropped": Metric("pairs without a verdict, or of equal texts"),
    "preferences/confidence": Metric("distance of the soft labels from one half"),
    "reward_model/loss": Metric("loss of the reward model"),
    "reward_model/accuracy": Metric("agreement of the reward model with the judge"),
    "reward_model/margin": Metric("margin of the reward model"),
    "reward_model/divergence": Metric("KL from the judge's labels to the reward model's (nats)"),
    "reward_model/grad_norm": Metric("grad norm of the reward model", drawn=False),
    "reward_model/learning_rate": Metric("learning rate of the reward model", drawn=False),
    "reward_model/skipped_updates": Metric("skipped updates of the reward model", drawn=False),
    # Progress.
    "step": Metric("step", drawn=False),
    "epoch": Metric("epoch", drawn=False),
    "round": Metric("round"),
    "beta": Metric("beta", drawn=False),
    "num_tokens": Metric("tokens", drawn=False),
    "step_time": Metric("seconds"),
    **{f"time/{stage}": Metric(word, drawn=False) for stage, word in STAGES.items()},
}

_OF_SAMPLES = (PART, DROPPED, "candidates/dropped_")
"""Prefixes of measurements of samples whose full names vary."""


def of_samples(name: str) -> bool:
    """Return True for a measurement of freshly sampled completions."""
    known = METRICS.get(name)
    return name.startswith(_OF_SAMPLES) if known is None else known.of_samples


def label(name: str) -> str:
    """Return a metric's label, prefixed with "held-out" for held-out metrics; an undeclared name as it is."""
    known = METRICS.get(name.removeprefix(HELD_OUT))
    if known is None:
        return name
    return f"held-out {known.label}" if name.startswith(HELD_OUT) else known.label
