"""Pairwise Cringe: imitate the chosen completion, and contrast each token of the rejected one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from palate.learn.objective import Needs, Numbers, pair_numbers
from palate.losses import cringe, pairwise_cringe
from palate.model import Outputs
from palate.model.sampling import draw, row_uniforms
from palate.types import Pair


@dataclass(frozen=True)
class PairwiseCringe:
    """Cross-entropy on chosen tokens and the Cringe loss on rejected ones, gated by the pair's margin.

    L = g · (Σ_t CE_t + α Σ_t Cringe_t) / (|chosen| + |rejected|),   g = σ((b - M) / τ)

    with M = log π(chosen) - log π(rejected), summed over tokens. Xu et al. 2023, arXiv:2312.16682, on the
    Cringe loss of Adolphs et al. 2022, arXiv:2211.05826, whose mean over all tokens of both kinds is taken
    here pair by pair. Each rejected token is set against another that the model finds likely there, drawn
    from the k likeliest but itself; a step that is taken again with the same seed draws the same.

    Metrics: `rewards/*` and `logps/*` with the log-probability as implicit reward; `nll_loss` and
    `cringe_loss`, means over the chosen's and the rejected's tokens; `gate`, the g of each pair.

    Attributes:
        seed: of the draws; another one for every step.
        k: how many likely tokens a contrast is drawn from, >= 1.
        b: margin in nats at which the gate is half open.
        tau: softness of the gate in nats, > 0.
        alpha: weight of the Cringe loss.
        detach_gate: let no gradient through the gate.
        detach_contrast: let no gradient through the contrast's logit.
    """

    seed: int
    k: int
    b: float
    tau: float
    alpha: float
    detach_gate: bool = False
    detach_contrast: bool = False

    @property
    def needs(self) -> Needs:
        """Log-probabilities and k + 1 logits: the rejected token may be among the likeliest."""
        return Needs(top_logits=self.k + 1)

    def __call__(self, outputs: Outputs, records: Sequence[Pair]) -> tuple[Tensor, Numbers]:
        """Loss of each pair. (R,)"""
        assert outputs.logps is not None
        chosen, rejected = outputs.logps.sum().view(-1, 2).unbind(-1)
        sizes, lost_sizes = outputs.logps.mask.sum(-1).view(-1, 2).unbind(-1)
        lost = outputs.take(torch.arange(1, 2 * len(records), 2, device=chosen.device))
        contrasted = self._cringe(lost, records)
        tokens = sizes + lost_sizes
        loss = pairwise_cringe(
            -chosen / tokens,
            contrasted / tokens,
            chosen,
            rejected,
            b=self.b,
            tau=self.tau,
            alpha=self.alpha,
            detach_gate=self.detach_gate,
        )
        with torch.no_grad():
            numbers = {
                **pair_numbers(chosen, rejected, None, None, 1.0),
                "nll_loss": -chosen / sizes,
                "cringe_loss": contrasted / lost_sizes,
                "gate": torch.sigmoid((self.b - (chosen - rejected)) / self.tau),
            }
        return loss, numbers

    def _cringe(self, lost: Outputs, records: Sequence[Pair]) -> Tensor:
        """The Cringe loss of each rejected completion, summed over its tokens. (R,)"""
        assert lost.target_logits is not None
        assert lost.top_logits is not None
        assert lost.top_tokens is not None
        mask = lost.target_logits.mask
        negative = torch.tensor([t for pair in records for t in pair.rejected.token_ids], device=mask.device)
        uniforms = np.concatenate([self._uniforms(pair) for pair in records])
        contrast = contrast_logits(
            lost.top_logits[mask],
            lost.top_tokens[mask],
            negative,
            torch.from_numpy(uniforms).to(mask.device),
        )
        if self.detach_contrast:
            contrast = contrast.detach()
        of_tokens = cringe(lost.target_logits.values[mask], contrast)
        return torch.stack([t.sum() for t in torch.split(of_tokens, mask.sum(-1).tolist())])

    def _uniforms(self, pair: Pair) -> np.ndarray:
        """One number per rejected token, keyed by prompt and tokens: the batch changes nothing."""
        name = f"{pair.prompt.id}:{pair.rejected.token_ids}"
        return row_uniforms(self.seed, name, 0, 0, len(pair.rejected.token_ids))


def contrast_logits(top_logits: Tensor, top_tokens: Tensor, negative: Tensor, uniforms: Tensor) -> Tensor:
    """Logit of a token drawn from the softmax of the k largest logits, that of the negative token left out.

    Args:
        top_logits: the k + 1 largest, the largest first, with gradient. (M, k + 1)
        top_tokens: whose they are. int64 (M, k + 1)
        negative: the tokens to be contrasted. int64 (M,)
        uniforms: in [0, 1), float64 (M,).

    Returns:
        With the gradient of `top_logits`. (M,)
    """
    same = top_tokens == negative[:, None]
    last = torch.full_like(negative, top_tokens.shape[-1] - 1)
    left_out = torch.where(same.any(-1), same.int().argmax(-1), last)
    rest = top_logits.detach().scatter(-1, left_out[:, None], -torch.inf)
    drawn = draw(rest.softmax(-1), uniforms)
    return top_logits.gather(-1, drawn[:, None])[:, 0]
