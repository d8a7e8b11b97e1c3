"""Objectives that learn an order: of a group's completions, and of a pair by a reward model."""

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
from palate.losses import bradley_terry, rrhf
from palate.model import Outputs
from palate.types import Example, Group, Pair


@dataclass(frozen=True)
class RankedGroups:
    """Rank a group's completions by their mean log-probability as their rewards are, and imitate the best.

    L = rank_weight · L_rank + L_nll(best)

    RRHF, Yuan et al. 2023, arXiv:2304.05302, with both weights 1 and the likelihood summed over tokens. The
    best is the completion with the highest reward, the first of them where several have it. A completion
    whose reward is None or not finite takes no part.

    Metrics are both terms, `rank_loss` and `nll_loss`; `logps/chosen` is the best's; `rewards/accuracies` and
    `rewards/margins` are means over the pairs of unlike reward in a group, a mean log-probability being the
    implicit reward.

    Attributes:
        likelihood: how the best completion's likelihood counts.
        rank_weight: weight of the rank loss.
    """

    likelihood: Likelihood = SUMMED
    rank_weight: float = 1.0
    needs: ClassVar[Needs] = Needs()

    def __call__(self, outputs: Outputs, records: Sequence[Group]) -> tuple[Tensor, Numbers]:
        """Loss of each group. (R,)"""
        assert outputs.logps is not None
        sizes = [len(group.completions) for group in records]
        mean_logps = pad_sequence(list(torch.split(outputs.logps.mean(), sizes)), batch_first=True)
        rewards = _rewards(records).to(mean_logps.device)
        rank = rrhf(mean_logps, rewards)
        best = rewards.nan_to_num(nan=-torch.inf).argmax(-1)
        examples = [Example(g.prompt, g.completions[i]) for g, i in zip(records, best.tolist(), strict=True)]
        imitation, of_best = self.likelihood(outputs.take(first_rows(outputs.logps, sizes) + best), examples)
        return self.rank_weight * rank + imitation, {
            **_order(mean_logps.detach(), rewards),
            "rank_loss": rank.detach(),
            "nll_loss": imitation.detach(),
            "logps/chosen": of_best["logps/completion"],
        }


def _rewards(groups: Sequence[Group]) -> Tensor:
    """Finite rewards, NaN where there is none. float64, in which two rewards differ if they do. (R, G)"""
    rows = []
    for group in groups:
        assert group.rewards is not None, "annotated groups"
        usable = [torch.nan if r is None or not math.isfinite(r) else float(r) for r in group.rewards]
        assert not all(map(math.isnan, usable)), "a method leaves such a group out"
        rows.append(torch.tensor(usable, dtype=torch.float64))
    return pad_sequence(rows, batch_first=True, padding_value=torch.nan)


def _order(values: Tensor, rewards: Tensor) -> Numbers:
    """How far the order of the values is that of the rewards; NaN for a group without unlike rewards. (R,)"""
    better = rewards[:, :, None] > rewards[:, None]
    margin = values[:, :, None] - values[:, None]
    count = better.sum((1, 2))
    return {
        "rewards/accuracies": (accuracy(margin) * better).sum((1, 2)) / count,
        "rewards/margins": (margin * better).sum((1, 2)) / count,
    }


@dataclass(frozen=True)
class Ranking:
    """A scalar head's rewards are to order pairs: the loss of a reward model, by Bradley and Terry.

    Metrics carry the names of TRL's reward trainer. Its `min_reward` and `max_reward` are extremes of a
    micro-batch; here they are means over pairs, of the lower and of the higher reward of each.

    Attributes:
        margin_scale: times a pair's own margin, if it has one, is the difference asked for, as with the
            ratings of Llama 2 (Touvron et al. 2023, arXiv:2307.09288); 0 asks for none.
        centring: times the squared sum of a pair's rewards is added to its loss, which draws rewards towards
            0 and leaves their difference free (Eisenstein et al. 2023, arXiv:2312.09244).
    """

    margin_scale: float = 0.0
    centring: float = 0.0
    needs: ClassVar[Needs] = Needs(head="scalar")

    def __call__(self, outputs: Outputs, records: Sequence[Pair]) -> tuple[Tensor, Numbers]:
        """Loss of each pair. (R,)"""
        assert outputs.scores is not None
        rewards = outputs.scores.view(-1, 2)
        chosen, rejected = rewards.unbind(-1)
        asked = torch.tensor([self.margin_scale * (pair.margin or 0.0) for pair in records]).to(chosen)
        loss = bradley_terry(chosen, rejected, margin=asked) + self.centring * (chosen + rejected).square()
        rewards = rewards.detach()
        margin = rewards[:, 0] - rewards[:, 1]
        return loss, {
            "accuracy": accuracy(margin),
            "margin": margin,
            "mean_reward": rewards.mean(-1),
            "min_reward": rewards.amin(-1),
            "max_reward": rewards.amax(-1),
        }
