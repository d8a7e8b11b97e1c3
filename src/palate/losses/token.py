"""Losses that follow from the probabilities of a completion's own tokens."""

from __future__ import annotations

from torch import Tensor

from palate.losses._checks import check_shapes


def nll(logps: Tensor) -> Tensor:
    """Negative log-likelihood of a completion: imitate it.

    L = -log π(completion) = -Σ_t log π(token t | prompt, tokens before t)

    Maximum likelihood, the loss of supervised fine-tuning and of training on selected samples. It weighs
    all tokens alike, hence long completions more; who wants all completions alike passes means.

    Args:
        logps: Under the policy, summed over completion tokens, end token included, in nats. (B,)

    Returns:
        Loss per completion, in nats, 0 where it is certain. (B,)
    """
    check_shapes("B", logps=logps)
    return -logps
