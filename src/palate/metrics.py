"""Metrics."""

from __future__ import annotations

OF_SAMPLES = (
    "completions/mean_", "completions/min_", "completions/max_", "completions/clipped_", "pairs/", "pool/",
    "candidates/", "objective/scores", "objective/unusable", "val/", "frac_reward_zero_std", "logps/fresh",
    "sampling/sampling_logp_difference/",
)  # fmt: skip


def of_samples(name: str) -> bool:
    """Return True for a number of freshly sampled completions."""
    return name.startswith(OF_SAMPLES)
