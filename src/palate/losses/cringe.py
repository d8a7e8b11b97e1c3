"""Cringe losses: imitate the chosen completion, and prefer other tokens to those of the rejected one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.losses._checks import check_not_negative, check_positive, check_same_shape, check_shapes


def cringe(negative_logits: Tensor, contrast_logits: Tensor) -> Tensor:
    """Return the loss that contrasts unwanted tokens with other tokens that the model finds likely.

    L = -log(e^s* / (e^s* + e^s)) = log(1 + e^(s - s*))

    The token loss of Cringe, Adolphs et al. 2022, arXiv:2211.05826: s is the logit of the negative token,
    s* is the logit of a token drawn from the other k likeliest tokens. The gradient flows into both logits;
    detach `contrast_logits` to push down only the negative token.

    Args:
        negative_logits: s, the logits of the tokens of a negative completion. (any shape)
        contrast_logits: s*, the logit of a contrast token at each position. (the same shape)

    Returns:
        Loss per token, log 2 if both logits are equal. The caller averages tokens and masks padding. (the
        same shape)
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
    """Return the Cringe loss of pairs, gated down for pairs whose chosen completion is already much likelier.

    L = g (L_CE(chosen) + α L_Cr(rejected)),   g = σ((b - M)/τ),   M = log π(chosen) - log π(rejected)

    Pairwise Cringe, Xu et al. 2023, arXiv:2312.16682. We do not know whether the paper lets the gradient
    flow through the gate g. By default it flows, so that training minimises the loss as written: the gate
    adds g (1 - g)/τ times the bracket as a push on M, in the same direction as the bracket. With detach_gate
    the gate is only a weight of the pair.

    Args:
        positive_nll: L_CE, the negative log-likelihood of the chosen completion. (B,)
        negative_cringe: L_Cr, `cringe` over the tokens of the rejected completion, reduced like
            positive_nll. (B,)
        chosen_logps: Log-probability of the chosen completion under the policy, summed over tokens, in
            nats. (B,)
        rejected_logps: The same for the rejected completion. (B,)
        b: Margin M at which the gate is half open, in nats.
        tau: Width of the gate in nats, > 0. Near 0, pairs have full weight below b and none above; for
            large tau all pairs have half their weight.
        alpha: Weight of the Cringe term, >= 0.
        detach_gate: Stop the gradient through the gate.

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
