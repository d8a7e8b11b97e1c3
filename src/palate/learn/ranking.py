"""Objectives that learn an order: of the completions of a group, and of a pair by a reward model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palate.learn.likelihood import SUMMED, Likelihood, first_rows
from palate.learn.objective import Needs, Numbers, accuracy
from palate.losses import bradley_terry, rrhf, soft_preference
from palate.model import Outputs
from palate.types import Example, Group, LabelledPair, Pair


@dataclass(frozen=True)
class RankedGroups:
    """Rank a group's mean log-probabilities in the order of the rewards, and imitate the best completion.

    L = rank_weight · L_rank + L_nll(best)

    RRHF, Yuan et al. 2023, arXiv:2304.05302, has both weights 1 and the likelihood summed over tokens. The
    best is the completion with the highest reward; if several have it, the first of them. A completion with
    a reward of None, or one that is not finite, is ignored.

    Metrics: both terms, `rank_loss` and `nll_loss`; `logps/chosen` of the best completion; and means over the
    pairs with different rewards in a group, `rewards/accuracies` and `rewards/margins`, with the mean
    log-probability as implicit reward.

    Attributes:
        likelihood: the loss on the best completion.
        rank_weight: weight of the rank loss.
    """

    likelihood: Likelihood = SUMMED
    rank_weight: float = 1.0
    needs: ClassVar[Needs] = Needs()

    def __call__(self, outputs: Outputs, records: Sequence[Group]) -> tuple[Tensor, Numbers]:
        """Return the loss of each group, and its metrics. (R,)"""
        assert outputs.logps is not None
        sizes = [len(group.completions) for group in records]
        mean_logps = pad_sequence(list(torch.split(outputs.logps.mean(), sizes)), batch_first=True)
        rewards = _rewards(records).to(mean_logps.device)
        rank = rrhf(mean_logps, rewards)
        best = rewards.nan_to_num(nan=-torch.inf).argmax(-1)
        examples = [Example(g.prompt, g.completions[i]) for g, i in zip(records, best.tolist(), strict=True)]
        imitation, numbers = self.likelihood(outputs.take(first_rows(outputs.logps, sizes) + best), examples)
        return self.rank_weight * rank + imitation, {
            **_order(mean_logps.detach(), rewards),
            "rank_loss": rank.detach(),
            "nll_loss": imitation.detach(),
            "logps/chosen": numbers["logps/completion"],
        }


def _rewards(groups: Sequence[Group]) -> Tensor:
    """Return the finite rewards in float64, which keeps different rewards apart; NaN for others. (R, G)"""
    rows = []
    for group in groups:
        assert group.rewards is not None, "groups must be annotated"
        usable = [torch.nan if r is None or not math.isfinite(r) else float(r) for r in group.rewards]
        assert not all(map(math.isnan, usable)), "a method must drop such a group"
        rows.append(torch.tensor(usable, dtype=torch.float64))
    return pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def _order(values: Tensor, rewards: Tensor) -> Numbers:
    """Return accuracy and margin of the values as a ranking by rewards; NaN if all rewards are equal. (R,)"""
    better = rewards[:, :, None] > rewards[:, None]
    margin = values[:, :, None] - values[:, None]
    count = better.sum((1, 2))
    return {
        "rewards/accuracies": (accuracy(margin) * better).sum((1, 2)) / count,
        "rewards/margins": (margin * better).sum((1, 2)) / count,
    }


@dataclass(frozen=True)
class Ranking:
    """The loss of a reward model: a scalar head's rewards order pairs, by Bradley and Terry.

    Metrics have the names of TRL's reward trainer. Its `min_reward` and `max_reward` are extremes of a
    micro-batch; here they are means over pairs, of the lower and of the higher reward of each pair.

    Attributes:
        margin_scale: factor on a pair's own margin, if it has one; the product is the required reward
            difference, as in Llama 2 (Touvron et al. 2023, arXiv:2307.09288). 0 requires none.
        centring: weight of the squared sum of a pair's rewards, which pulls rewards towards 0 and does not
            constrain their difference (Eisenstein et al. 2023, arXiv:2312.09244).
    """

    margin_scale: float = 0.0
    centring: float = 0.0
    needs: ClassVar[Needs] = Needs(head="scalar")

    def __call__(self, outputs: Outputs, records: Sequence[Pair]) -> tuple[Tensor, Numbers]:
        """Return the loss of each pair, and its metrics. (R,)"""
        assert outputs.scores is not None
        rewards = outputs.scores.view(-1, 2)
        chosen, rejected = rewards.unbind(-1)
        target = torch.tensor([self.margin_scale * (pair.margin or 0.0) for pair in records]).to(chosen)
        loss = bradley_terry(chosen, rejected, margin=target) + self.centring * (chosen + rejected).square()
        rewards = rewards.detach()
        margin = rewards[:, 0] - rewards[:, 1]
        return loss, {
            "accuracy": accuracy(margin),
            "margin": margin,
            "mean_reward": rewards.mean(-1),
            "min_reward": rewards.amin(-1),
            "max_reward": rewards.amax(-1),
        }


@dataclass(frozen=True)
class SoftRanking:
    """The loss of a reward model on soft labels: the cross-entropy with the judge's probabilities.

    RLAIF, Lee et al. 2023, arXiv:2309.00267; see `soft_preference`. The labels are used as they are: none is
    rounded to 0 or 1.

    Metrics: `accuracy`, the share of pairs that the rewards order as the judge does; `margin`, the reward of
    the preferred completion minus that of the other; `divergence`, the loss minus its minimum, which is the
    KL from the judge's probability to the model's, in nats. Pairs with a probability of exactly one half
    have no accuracy and no margin.
    """

    needs: ClassVar[Needs] = Needs(head="scalar")

    def __call__(self, outputs: Outputs, records: Sequence[LabelledPair]) -> tuple[Tensor, Numbers]:
        """Return the loss of each pair, and its metrics. (R,)"""
        assert outputs.scores is not None
        first, second = outputs.scores.view(-1, 2).unbind(-1)
        p = torch.tensor([pair.p for pair in records], dtype=torch.float64).to(first)
        loss = soft_preference(first, second, p)
        prefers = torch.where(p == 0.5, torch.nan, torch.sign(p - 0.5))
        margin = prefers * (first - second).detach()
        least = torch.special.entr(p) + torch.special.entr(1 - p)
        return loss, {
            "accuracy": torch.where(margin.isnan(), torch.nan, accuracy(margin)),
            "margin": margin,
            "divergence": loss.detach() - least,
        }
