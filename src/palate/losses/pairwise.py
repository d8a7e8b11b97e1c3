"""Losses on a pair of completions of one prompt, the chosen and the rejected.

Each takes log-probabilities summed over a completion's tokens and returns a loss per pair, unreduced.
Losses with a reference depend on the pair only through the margin in nats

    h = log π(chosen)/ref(chosen) - log π(rejected)/ref(rejected)

Hinges are easily confused: `hinge_norm` has a reference, the others have none; `rso_hinge` and
`slic_rank` differ only in scale, and `click` is `slic_rank` with the names of its paper. The gradient of a
hinge is 0 beyond its margin and at the kink.

`PAIR_LOSSES` lists the losses by name, each with the facts that an objective needs to call it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from palate.losses._checks import check_label_smoothing, check_positive, check_shapes


def dpo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the logistic loss on the margin over the reference: the preference's negative log-likelihood.

    L = -(1 - ε) log σ(β h) - ε log σ(-β h)

    Rafailov et al. 2023, arXiv:2305.18290, Eq. 7, with ε = 0. RSO's sigmoid-norm (arXiv:2309.06657) is
    the same with γ for β. ε > 0 is cDPO (Mitchell 2023, https://ericmitchell.ai/cdpo.pdf, Eq. 3).

    Args:
        chosen_logps: Log-probability of the chosen completion under the policy, summed over tokens, in
            nats. (B,)
        rejected_logps: The same for the rejected completion. (B,)
        ref_chosen_logps: The same for the chosen completion under the frozen reference. (B,)
        ref_rejected_logps: The same for the rejected completion under the frozen reference. (B,)
        beta: Strength of the KL constraint to the reference, > 0, typically 0.1 to 0.5. Near 0 the reference
            has no influence.
        label_smoothing: ε, the probability of a flipped label, 0 <= ε < 0.5. With ε > 0 the loss has its
            minimum at the finite margin h = log((1 - ε)/ε) / β; with ε = 0 it has no minimum.

    Returns:
        Loss per pair, log 2 at policy = reference for any beta. (B,)
    """
    check_shapes(
        "B",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    check_positive(beta=beta)
    check_label_smoothing(label_smoothing)
    logits = beta * _margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
    return -(1 - label_smoothing) * F.logsigmoid(logits) - label_smoothing * F.logsigmoid(-logits)


def ipo(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    tau: float,
) -> Tensor:
    """Return the squared distance of the margin from a fixed target: identity preference optimisation.

    L = (h - 1/(2τ))²

    Azar et al. 2023, arXiv:2310.12036, Eq. 17. Unlike DPO, the loss has a minimum even if all labels agree:
    it pushes back a margin beyond the target. The loss grows with the square of the target, so another τ
    needs another learning rate. Log-probabilities are sums, as in the paper, so long completions reach the
    target sooner; some trainers divide by the length.

    Args:
        chosen_logps: Log-probability of the chosen completion under the policy, summed over tokens, in
            nats. (B,)
        rejected_logps: The same for the rejected completion. (B,)
        ref_chosen_logps: The same for the chosen completion under the frozen reference. (B,)
        ref_rejected_logps: The same for the rejected completion under the frozen reference. (B,)
        tau: Strength of the regularisation to the reference, > 0, typically 0.1 to 1. Near 0 the target is
            unbounded; for large tau it approaches 0, which keeps the policy at the reference.

    Returns:
        Loss per pair, in squared nats. (B,)
    """
    check_shapes(
        "B",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    check_positive(tau=tau)
    target = 1 / (2 * tau)
    return (_margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps) - target) ** 2


def hinge_norm(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    *,
    gamma: float,
) -> Tensor:
    """Return the hinge loss on the margin over the reference.

    L = max(0, 1 - γ h)

    RSO's hinge-norm, Liu et al. 2023, arXiv:2309.06657. OAIF (Guo et al. 2024, arXiv:2402.04792) uses it
    under the name SLiC, and DPO toolkits as "hinge"; SLiC-HF's own loss is `slic_rank`.

    Args:
        chosen_logps: Log-probability of the chosen completion under the policy, summed over tokens, in
            nats. (B,)
        rejected_logps: The same for the rejected completion. (B,)
        ref_chosen_logps: The same for the chosen completion under the frozen reference. (B,)
        ref_rejected_logps: The same for the rejected completion under the frozen reference. (B,)
        gamma: Inverse of the margin in nats at which the loss of a pair becomes 0, > 0: 0.05 in RSO, 0.002
            in OAIF. Near 0 the loss never becomes 0; for large gamma any h > 0 is enough.

    Returns:
        Loss per pair, 1 at policy = reference, 0 for h >= 1/γ. (B,)
    """
    check_shapes(
        "B",
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        ref_chosen_logps=ref_chosen_logps,
        ref_rejected_logps=ref_rejected_logps,
    )
    check_positive(gamma=gamma)
    return torch.relu(1 - gamma * _margin(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps))


def rso_hinge(chosen_logps: Tensor, rejected_logps: Tensor, *, gamma: float) -> Tensor:
    """Return the hinge loss on the difference of log-probabilities, without a reference.

    L = max(0, 1 - γ (log π(chosen) - log π(rejected)))

    RSO's hinge, Liu et al. 2023, arXiv:2309.06657: `slic_rank` with δ = 1/γ, times γ.

    Args:
        chosen_logps: Log-probability of the chosen completion under the policy, summed over tokens, in
            nats. (B,)
        rejected_logps: The same for the rejected completion. (B,)
        gamma: Inverse of the margin in nats at which the loss of a pair becomes 0, > 0: 0.05 in RSO.
            Near 0 the loss never becomes 0; for large gamma the right order is enough.

    Returns:
        Loss per pair, 1 if both are equally likely. (B,)
    """
    check_shapes("B", chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_positive(gamma=gamma)
    return torch.relu(1 - gamma * (chosen_logps - rejected_logps))


def slic_rank(chosen_logps: Tensor, rejected_logps: Tensor, *, delta: float) -> Tensor:
    """Return the rank calibration loss: the chosen completion should be δ nats likelier than the rejected.

    L = max(0, δ - log π(chosen) + log π(rejected))

    The first term of SLiC-HF, Zhao et al. 2023, arXiv:2305.10425. The second term is `nll` of a target text,
    which replaces a reference.

    Args:
        chosen_logps: Log-probability of the chosen completion under the policy, summed over tokens, in
            nats. (B,)
        rejected_logps: The same for the rejected completion. (B,)
        delta: Margin in nats, > 0, typically 1. Near 0 the right order is enough; for large delta the loss
            never becomes 0.

    Returns:
        Loss per pair, in nats, δ if both are equally likely. (B,)
    """
    check_shapes("B", chosen_logps=chosen_logps, rejected_logps=rejected_logps)
    check_positive(delta=delta)
    return torch.relu(delta - (chosen_logps - rejected_logps))


def click(pos_logps: Tensor, neg_logps: Tensor, *, margin: float) -> Tensor:
    """Return the contrastive loss of a generation with a wanted attribute and a generation without it.

    L = max(0, margin + log π(neg) - log π(pos))

    The contrastive term of CLICK, Zheng et al. 2023, arXiv:2306.03350, which adds it to the language
    modelling loss (`nll`) with a weight. The equation is the same as in `slic_rank`, but the margin, in nats
    of a whole sequence, is much wider.

    Args:
        pos_logps: Log-probability of the positive completion under the policy, summed over tokens, in
            nats. (B,)
        neg_logps: The same for the negative completion. (B,)
        margin: Margin in nats, > 0: 15 or 20 for completions of about 30 to 160 tokens. Near 0 the right
            order is enough; for a large margin the loss never becomes 0.

    Returns:
        Loss per pair, in nats, equal to the margin if both are equally likely. (B,)
    """
    check_shapes("B", pos_logps=pos_logps, neg_logps=neg_logps)
    check_positive(margin=margin)
    return torch.relu(margin - (pos_logps - neg_logps))


@dataclass(frozen=True)
class PairLoss:
    """A pairwise loss, and the facts that an objective needs to call it."""

    fn: Callable[..., Tensor]
    strength: str
    """The loss's keyword, as in its paper, for the option that configurations call beta."""
    needs_ref: bool
    """True if the loss takes the reference's log-probabilities."""
    reduce: Literal["sum", "mean"]
    """Reduction of a completion's token log-probabilities to the number that the loss takes."""
    scales: bool = True
    """True if the strength multiplies log-probabilities; False if it is a margin between them, in nats."""

    def __call__(
        self,
        chosen: Tensor,
        rejected: Tensor,
        ref_chosen: Tensor | None,
        ref_rejected: Tensor | None,
        strength: float,
        **options: float,
    ) -> Tensor:
        """Return the loss per pair; the reference is used only if the loss needs it. All tensors are (B,)."""
        keywords = {self.strength: strength}
        if not self.needs_ref:
            return self.fn(chosen, rejected, **keywords, **options)
        if ref_chosen is None or ref_rejected is None:
            missing = "ref_chosen" if ref_chosen is None else "ref_rejected"
            raise ValueError(
                f"{missing} is None, but {self.fn.__name__} needs the reference's log-probabilities"
            )
        return self.fn(chosen, rejected, ref_chosen, ref_rejected, **keywords, **options)


PAIR_LOSSES: Mapping[str, PairLoss] = MappingProxyType(
    {
        "dpo": PairLoss(dpo, strength="beta", needs_ref=True, reduce="sum"),
        "ipo": PairLoss(ipo, strength="tau", needs_ref=True, reduce="sum"),
        "hinge_norm": PairLoss(hinge_norm, strength="gamma", needs_ref=True, reduce="sum"),
        "rso_hinge": PairLoss(rso_hinge, strength="gamma", needs_ref=False, reduce="sum"),
        "slic_rank": PairLoss(slic_rank, strength="delta", needs_ref=False, reduce="sum", scales=False),
        "click": PairLoss(click, strength="margin", needs_ref=False, reduce="sum", scales=False),
    }
)
"""The pairwise losses by name."""


def _margin(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """Return the margin h. Subtracting within each completion first keeps precision near the reference."""
    return (chosen - ref_chosen) - (rejected - ref_rejected)
