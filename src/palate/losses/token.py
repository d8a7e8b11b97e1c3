"""Losses that depend only on the probabilities of a completion's own tokens."""

from __future__ import annotations

from torch import Tensor

from palate.losses._checks import check_shapes


def nll(logps: Tensor) -> Tensor:
    """Return the negative log-likelihood of completions, to imitate them.

    L = -log π(completion) = -Σ_t log π(token t | prompt, tokens before t)

    Maximum likelihood, the loss of supervised fine-tuning and of training on selected samples. All tokens
    have the same weight, so long completions have more; pass means to weight completions equally.

    Args:
        logps: Log-probability of each completion under the policy, summed over its tokens including the end
            token, in nats. (B,)

    Returns:
        Loss per completion, in nats, 0 for a completion with probability 1. (B,)
    """
    check_shapes("B", logps=logps)
    return -logps
