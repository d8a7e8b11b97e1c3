"""Objectives that raise the likelihood of completions, alone or beside a loss on pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from palate.learn.objective import Needs, Numbers, Pairwise
from palate.losses import nll
from palate.model import Outputs, TokenValues
from palate.types import AnchoredPair, Example, Pair


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood of completions: supervised fine-tuning, and learning from selected samples.

    A learner takes the mean over the records of an update. So the loss of an update is

    - with reduce "mean", the mean over completions of their mean over tokens: a short completion counts as
      much as a long one, each of its tokens more;
    - with reduce "sum", the mean over completions of -log π(completion), as equations have it;
    - with `per_token`, the mean over all tokens of the update, as is the custom of fine-tuning.

    Attributes:
        reduce: how a completion's tokens become one number.
        divisor: what the loss of every record is divided by.
    """

    reduce: Literal["sum", "mean"] = "mean"
    divisor: float = 1.0
    needs: ClassVar[Needs] = Needs()

    @classmethod
    def per_token(cls, examples: Sequence[Example]) -> Likelihood:
        """The objective of one update on these examples in which all their tokens count alike.

        Sums are divided by the mean length, which no micro-batch could know; the mean over the examples then
        is the sum over all tokens divided by their number.
        """
        assert examples, "nothing to learn from"
        return cls("sum", sum(len(e.completion.token_ids) for e in examples) / len(examples))

    def __call__(self, outputs: Outputs, records: Sequence[Example]) -> tuple[Tensor, Numbers]:
        """Loss of each example. (R,)"""
        assert outputs.logps is not None
        logps = outputs.logps.sum()
        loss = nll(logps if self.reduce == "sum" else outputs.logps.mean()) / self.divisor
        return loss, {"logps/completion": logps.detach()}


SUMMED = Likelihood("sum")
"""-log π(completion), as equations beside a ranking loss have it."""


@dataclass(frozen=True)
class Anchored:
    """A loss on pairs beside the likelihood of an anchor, which keeps the policy where it is fluent.

    L = pair_weight · L_pair + anchor_weight · L_nll(anchor)

    SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) has L_pair = `slic_rank`, anchor_weight = λ, and as anchor
    the target of supervised fine-tuning or the best-ranked candidate; CLICK (Zheng et al. 2023,
    arXiv:2306.03350) has L_pair = `click` and pair_weight = α. A plain `Pair` is its own anchor: its chosen
    completion.

    Metrics are those of the pairwise loss, both terms before they are weighed, `rank_loss` and `nll_loss`,
    and `logps/anchor`.

    Attributes:
        pairwise: the loss on pairs.
        likelihood: how the anchor's likelihood counts.
        pair_weight, anchor_weight: the weights of the two.
    """

    pairwise: Pairwise
    likelihood: Likelihood = SUMMED
    pair_weight: float = 1.0
    anchor_weight: float = 1.0

    @property
    def needs(self) -> Needs:
        """The needs of the pairwise loss."""
        return self.pairwise.needs

    def __call__(self, outputs: Outputs, records: Sequence[Pair | AnchoredPair]) -> tuple[Tensor, Numbers]:
        """Loss of each record. (R,)"""
        assert outputs.logps is not None
        starts = first_rows(outputs.logps, [len(r.completions) for r in records])
        third = torch.tensor([2 * isinstance(r, AnchoredPair) for r in records], device=starts.device)
        pairs = [r.pair if isinstance(r, AnchoredPair) else r for r in records]
        rank, numbers = self.pairwise(outputs.take(torch.stack((starts, starts + 1), -1).flatten()), pairs)
        imitation, anchored = self.likelihood(outputs.take(starts + third), anchors(records))
        return self.pair_weight * rank + self.anchor_weight * imitation, {
            **numbers,
            "rank_loss": rank.detach(),
            "nll_loss": imitation.detach(),
            "logps/anchor": anchored["logps/completion"],
        }


def anchors(records: Sequence[Pair | AnchoredPair]) -> list[Example]:
    """The completion of each record whose likelihood `Anchored` raises, for `Likelihood.per_token`."""
    return [Example(r.prompt, r.anchor if isinstance(r, AnchoredPair) else r.chosen) for r in records]


def first_rows(values: TokenValues, sizes: Sequence[int]) -> Tensor:
    """Where each record's completions begin among those of all, from their numbers. int64 (R,)"""
    counts = torch.tensor(sizes, device=values.mask.device)
    return counts.cumsum(0) - counts
