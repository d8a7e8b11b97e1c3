"""Cringe losses: imitate the chosen completion, and at each token of the rejected one prefer another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.losses._checks import check_not_negative, check_positive, check_same_shape, check_shapes


def cringe(negative_logits: Tensor, contrast_logits: Tensor) -> Tensor:
    """Contrast of a token that is not to be said with one that the model might have said instead.

    L = -log(e^s* / (e^s* + e^s)) = log(1 + e^(s - s*))

    The token loss of Cringe, Adolphs et al. 2022, arXiv:2211.05826: s is the logit of the negative token,
    s* that of a token drawn from the other k likeliest ones. Gradient flows into both logits; whoever
    wants the negative one pushed down alone detaches the other.

    Args:
        negative_logits: s, before the softmax, of the tokens of a negative completion. (any shape)
        contrast_logits: s*, of a contrast token at the same positions. (the same shape)

    Returns:
        Loss per token, log 2 where both logits are equal; how tokens are averaged, and that padding does
        not count, is the caller's concern. (the same shape)
    """
    check_same_shape(negative_logits=negative_logits, contrast_logits=contrast_logits)
    return -F.logsigmoid(contrast_logits - negative_logits)


def pairwise_cringe(
    positive_nll: Tensor,
    negative_cringe: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    *,
    b: float,
    tau: float,
    alpha: float,
    detach_gate: bool = False,
) -> Tensor:
    """Cringe on a pair, faded out where the chosen completion is likelier by far already.

    L = g (L_CE(chosen) + α L_Cr(rejected)),   g = σ((b - M)/τ),   M = log π(chosen) - log π(rejected)

    Pairwise Cringe, Xu et al. 2023, arXiv:2312.16682. Whether the paper lets gradient through the gate g
    is not known to us. By default it flows, so that what is minimised is the loss as written: it adds
    g (1 - g)/τ times the bracket as a push on M, which raises the chosen completion against the rejected
    one as the bracket itself does. Without it the gate is but a weight of the pair.

    Args:
        positive_nll: L_CE, negative log-likelihood of the chosen completion. (B,)
        negative_cringe: L_Cr, `cringe` over the tokens of the rejected one, reduced as positive_nll is.
            (B,)
        chosen_logps: Of the chosen completion under the policy, summed over its tokens, in nats. (B,)
        rejected_logps: The same of the rejected completion. (B,)
        b: The M in nats at which the gate is half open.
        tau: Softness of the gate in nats, > 0. Towards 0 pairs count in full below b and not at all
            above, for large tau the gate is half open for all.
        alpha: Weight of the Cringe term, >= 0.
        detach_gate: Whether the gate is a weight without gradient.

    Returns:
        Loss per pair, in the units of positive_nll. (B,)
    """
    check_shapes(
        "B",
        positive_nll=positive_nll,
        negative_cringe=negative_cringe,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
    )
    check_positive(tau=tau)
    check_not_negative(alpha=alpha)
    if not math.isfinite(b):
        raise ValueError(f"b is {b}, expected a finite number of nats")
    gate = torch.sigmoid((b - (chosen_logps - rejected_logps)) / tau)
    if detach_gate:
        gate = gate.detach()
    return gate * (positive_nll + alpha * negative_cringe)
