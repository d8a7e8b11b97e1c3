"""Numbers that heads compute from hidden states or logits, for all engines."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class HeadValues(NamedTuple):
    """Numbers of a language-model head for M target tokens, float32 (float64 for float64 inputs)."""

    logps: Tensor
    """Log-probability of the target. (M,), carries gradient."""
    entropy: Tensor
    """Entropy in nats of the distribution over the vocabulary. (M,), no gradient."""
    top1: Tensor
    """1 if the target is the likeliest token, else 0. (M,), no gradient."""
    logits: Tensor
    """Logit of the target, after the soft cap. (M,), carries gradient."""
    top_logits: Tensor
    """The K largest logits, in descending order. (M, K), carries gradient."""
    top_tokens: Tensor
    """Tokens of the largest logits. int64 (M, K)"""

    @classmethod
    def of_logits(
        cls, scored: Tensor, targets: Tensor, *, statistics: bool = False, top_logits: int = 0
    ) -> HeadValues:
        """Compute the values from logits. scored (M, V), targets int64 (M,)"""
        normaliser = scored.logsumexp(-1)
        logits = scored.gather(-1, targets[:, None])[:, 0]
        entropy = top1 = torch.zeros_like(normaliser, requires_grad=False)
        if statistics:
            with torch.no_grad():
                entropy = normaliser - (torch.softmax(scored, -1) * scored).sum(-1)
                top1 = (scored.argmax(-1) == targets).to(scored.dtype)
        top = scored.topk(min(top_logits, scored.shape[-1]), dim=-1)
        return cls(logits - normaliser, entropy, top1, logits, top.values, top.indices)


def scores_of(network: Any, hidden: Tensor) -> Tensor:
    """Return a classifier's scores of hidden states (M, H): float32 (M,).

    The computation is in float32, because rounding must not turn close scores into ties.
    """
    head = network.score
    bias = None if head.bias is None else head.bias.float()
    return nn.functional.linear(hidden.float(), head.weight.float(), bias)[:, 0]
