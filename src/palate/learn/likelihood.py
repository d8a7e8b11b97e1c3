"""Objectives that raise the likelihood of completions, alone or together with a loss on pairs."""

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
    """Negative log-likelihood of completions, for supervised fine-tuning and for selected samples.

    A learner takes the mean over the records of an update. So the loss of an update is

    - with reduce "mean", the mean over completions of their mean over tokens: all completions have the same
      weight, so tokens of short completions have more;
    - with reduce "sum", the mean over completions of -log π(completion), as papers define it;
    - with `per_token`, the mean over all tokens of the update, as is usual in fine-tuning.

    Attributes:
        reduce: reduction of a completion's tokens to one number.
        divisor: divisor of the loss of every record.
    """

    reduce: Literal["sum", "mean"] = "mean"
    divisor: float = 1.0
    needs: ClassVar[Needs] = Needs()

    @classmethod
    def per_token(cls, examples: Sequence[Example]) -> Likelihood:
        """Return the objective of one update on these examples in which all tokens have the same weight.

        It divides sums by the mean length of all examples, which a micro-batch does not know. The mean over
        the examples then equals the sum over all tokens divided by their number.
        """
        assert examples, "no examples to learn from"
        return cls("sum", sum(len(e.completion.token_ids) for e in examples) / len(examples))

    def __call__(self, outputs: Outputs, records: Sequence[Example]) -> tuple[Tensor, Numbers]:
        """Return the loss of each example, and its metrics. (R,)"""
        assert outputs.logps is not None
        logps = outputs.logps.sum()
        loss = nll(logps if self.reduce == "sum" else outputs.logps.mean()) / self.divisor
        return loss, {"logps/completion": logps.detach()}


SUMMED = Likelihood("sum")
"""-log π(completion), the likelihood term that papers add to a ranking loss."""


@dataclass(frozen=True)
class Anchored:
    """A loss on pairs plus the likelihood of an anchor, which keeps the policy fluent.

    L = pair_weight · L_pair + anchor_weight · L_nll(anchor)

    SLiC-HF (Zhao et al. 2023, arXiv:2305.10425) uses L_pair = `slic_rank`, anchor_weight = λ, and as anchor
    the target of supervised fine-tuning or the best-ranked candidate; CLICK (Zheng et al. 2023,
    arXiv:2306.03350) uses L_pair = `click` and pair_weight = α. The anchor of a plain `Pair` is its chosen
    completion.

    Metrics: those of the pairwise loss; the two terms before weighting, `rank_loss` and `nll_loss`; and
    `logps/anchor`.

    Attributes:
        pairwise: the loss on pairs.
        likelihood: the loss on anchors.
        pair_weight, anchor_weight: the weights of the two losses.
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
        """Return the loss of each record, and its metrics. (R,)"""
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
    """Return the anchor of each record as an example, for `Likelihood.per_token`."""
    return [Example(r.prompt, r.anchor if isinstance(r, AnchoredPair) else r.chosen) for r in records]


def first_rows(values: TokenValues, sizes: Sequence[int]) -> Tensor:
    """Return the row of each record's first completion, from the numbers of completions. int64 (R,)"""
    counts = torch.tensor(sizes, device=values.mask.device)
    return counts.cumsum(0) - counts
