"""Signs of runs that learn by policy gradients. The thresholds are ours, as in `palate.report.signs`."""

from __future__ import annotations

from palate.report.sign import Sign
from palate.report.spans import late, quarters
from palate.report.words import number, percent
from palate.rundir import RunRecord

EXPLAINED_NOTE, EXPLAINED_WORRY = 0.1, 0.0
"""Explained variance. At 0 a constant would do as well; below it, the value function adds noise."""
ENTROPY_NOTE, ENTROPY_WORRY = 0.5, 0.2
"""Entropy of the last quarter over that of the first one. Some fall is what learning is."""
CLIPPED_NOTE, CLIPPED_WORRY = 0.2, 0.4
"""Share of tokens beyond the bound of PPO. Published runs have up to about a tenth."""
FEWEST_STEPS = 8
"""Steps below which a value function has had no time to learn."""


def value_useless(run: RunRecord) -> Sign | None:
    """The value function predicts the returns no better than a constant."""
    explained = late(run, "val/explained_variance")
    steps = len(run.curve("val/explained_variance")[0])
    if explained is None or steps < FEWEST_STEPS or explained >= EXPLAINED_NOTE:
        return None
    return Sign(
        "value_useless",
        "worry" if explained < EXPLAINED_WORRY else "note",
        "The value function predicts little",
        f"In the last quarter of the steps, it explains {percent(explained)} of the variance of the returns.",
        "Advantages are then as noisy as plain returns, or noisier: the policy learns slowly or wrongly, and "
        "the memory of the value function is spent without gain.",
        "A higher or lower --value-lr, some --value-warmup, a --value-model that starts from the reward "
        "model, or --estimator rloo, which has no value function.",
    )


def entropy_collapses(run: RunRecord) -> Sign | None:
    """The policy has become certain of nearly every token."""
    ends = quarters(run, "policy/entropy_avg")
    if ends is None or ends[0] <= 0 or ends[1] / ends[0] >= ENTROPY_NOTE:
        return None
    return Sign(
        "entropy_collapses",
        "worry" if ends[1] / ends[0] < ENTROPY_WORRY else "note",
        "The completions lose their variety",
        f"The entropy of a token went from {number(ends[0])} to {number(ends[1])} nats.",
        "A policy that is certain of every token tries nothing new, so it can learn nothing new. It often "
        "says the same text to every prompt.",
        "Read the samples. Then a larger --beta, a lower --lr, or fewer steps.",
    )


def steps_too_long(run: RunRecord) -> Sign | None:
    """The passes over the same completions move the policy out of PPO's bounds."""
    clipped, kl = late(run, "policy/clipfrac_avg"), late(run, "policy/approxkl_avg")
    if clipped is None or clipped < CLIPPED_NOTE:
        return None
    within = "" if kl is None else f" The policy moved by {number(kl)} nats per token within a step."
    return Sign(
        "steps_too_long",
        "worry" if clipped >= CLIPPED_WORRY else "note",
        "The policy moves too far in a step",
        f"In the last quarter of the steps, {percent(clipped)} of the tokens were beyond the bound of PPO."
        f"{within}",
        "Tokens beyond the bound have no gradient. Many of them mean that the samples are out of date while "
        "they are still learnt from.",
        "A lower --lr, fewer --ppo-epochs, or a larger --batch-size.",
    )
