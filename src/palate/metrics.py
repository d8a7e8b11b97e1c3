"""The metrics that runs write, by name: declared here once, and read by the live display, lists and reports.

A name that is no name of TRL's is ours. Measurements on held-out data have the same names after `eval_`. A
method may write other names as well; a report draws them without a word on them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

HELD_OUT = "eval_"
"""Prefix of held-out measurements."""

PART = "objective/scores/"
"""Prefix of the parts of a reward, where several are weighed and added."""

DROPPED = "pairs/dropped_"
"""Prefix of counts of groups that gave no pair, by reason."""

STAGES = {"sample": "sampling", "annotate": "scoring", "learn": "learning", "evaluate": "measuring"}
"""Stages of a step, whose seconds a run writes as `time/sample`, and the words for them."""


@dataclass(frozen=True)
class Metric:
    """One metric.

    Attributes:
        label: a few words for people.
        of_samples: a number of freshly sampled completions: where several steps learn from the same samples,
            it has one value for all of them.
        drawn: a report has a plot of its own or none for it, so that it is not drawn among the others.
    """

    label: str
    of_samples: bool = False
    drawn: bool = True


def _samples(label: str) -> Metric:
    return Metric(label, of_samples=True)


METRICS: Mapping[str, Metric] = {
    # The reward and what became of the samples.
    "objective/scores": _samples("reward"),
    "objective/scores_std": _samples("spread of the reward"),
    "objective/scores_margin": _samples("best - worst"),
    "objective/unusable": _samples("unusable rewards"),
    "objective/kl": Metric("KL (nats)"),
    "kl/fresh": Metric("KL of fresh samples (nats)"),
    "frac_reward_zero_std": _samples("groups of equal rewards"),
    "pairs/kept": _samples("pairs"),
    "pairs/dropped": _samples("dropped"),
    "candidates/kept": _samples("candidates kept"),
    "candidates/dropped": _samples("candidates dropped"),
    "candidates/scores": _samples("reward of the candidates kept"),
    "completions/kept": Metric("completions kept"),
    "pool/size": _samples("pool"),
    "pool/scores": _samples("reward of the pool"),
    "threshold": Metric("threshold"),
    # The samples themselves.
    "completions/mean_length": _samples("tokens each"),
    "completions/min_length": _samples("fewest tokens"),
    "completions/max_length": _samples("most tokens"),
    "completions/mean_terminated_length": _samples("tokens each, where ended"),
    "completions/clipped_ratio": _samples("cut"),
    "val/contain_eos_token": _samples("ended"),
    "logps/fresh": _samples("log-probability of own completions"),
    "sampling/sampling_logp_difference/mean": _samples("sampler against learner"),
    "sampling/sampling_logp_difference/max": _samples("sampler against learner, largest"),
    "sampling/tokens_per_second": Metric("tokens per second"),
    # The judge: what it said in this step, and what it has taken since the run began.
    "judge/unusable": Metric("unusable verdicts", drawn=False),
    "judge/orders_disagree": Metric("one place wins in both orders", drawn=False),
    "judge/verdicts": Metric("verdicts"),
    "judge/tokens": Metric("judge's tokens"),
    "judge/cost": Metric("judge ($)", drawn=False),
    # Learning.
    "loss": Metric("loss"),
    "rank_loss": Metric("loss of the order"),
    "nll_loss": Metric("loss of the likelihood"),
    "cringe_loss": Metric("loss of the rejected tokens"),
    "gate": Metric("gate"),
    "grad_norm": Metric("grad norm"),
    "learning_rate": Metric("learning rate"),
    "entropy": Metric("entropy"),
    "mean_token_accuracy": Metric("token accuracy"),
    "skipped_updates": Metric("updates left out"),
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
    "logps/training": Metric("log-probability of what is learnt from"),
    # Reward models.
    "accuracy": Metric("accuracy"),
    "margin": Metric("margin"),
    "mean_reward": Metric("mean reward"),
    "min_reward": Metric("lower reward"),
    "max_reward": Metric("higher reward"),
    # The place in the run.
    "step": Metric("step", drawn=False),
    "epoch": Metric("epoch", drawn=False),
    "round": Metric("round"),
    "beta": Metric("beta", drawn=False),
    "num_tokens": Metric("tokens", drawn=False),
    "step_time": Metric("seconds"),
    **{f"time/{stage}": Metric(word, drawn=False) for stage, word in STAGES.items()},
}

_OF_SAMPLES = (PART, DROPPED, "candidates/dropped_")
"""Prefixes of numbers of samples that have an open set of names."""


def of_samples(name: str) -> bool:
    """Return True for a number of freshly sampled completions."""
    known = METRICS.get(name)
    return name.startswith(_OF_SAMPLES) if known is None else known.of_samples


def label(name: str) -> str:
    """Return the words for a metric, held-out ones included; the name itself where none are declared."""
    known = METRICS.get(name.removeprefix(HELD_OUT))
    if known is None:
        return name
    return f"held-out {known.label}" if name.startswith(HELD_OUT) else known.label
