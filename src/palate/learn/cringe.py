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

    with M = log π(chosen) - log π(rejected), summed over tokens. Xu et al. 2023, arXiv:2312.16682, with the
    Cringe loss of Adolphs et al. 2022, arXiv:2211.05826; its mean over all tokens of both kinds is computed
    per pair here. Each rejected token is contrasted with another token that the model finds likely there,
    drawn from the k likeliest without itself. The same seed draws the same tokens when a step is repeated.

    Metrics: `rewards/*` and `logps/*` with the log-probability as implicit reward; `nll_loss` and
    `cringe_loss`, means over the chosen and the rejected tokens; `gate`, the g of each pair.

    Attributes:
        seed: seed of the draws; a different one for every step.
        k: number of likely tokens to draw a contrast from, >= 1.
        b: margin in nats at which the gate is half open.
        tau: width of the gate in nats, > 0.
        alpha: weight of the Cringe loss.
        detach_gate: stop the gradient through the gate.
        detach_contrast: stop the gradient through the logit of the contrast.
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
        """Log-probabilities and k + 1 logits, since the rejected token may be among the likeliest."""
        return Needs(top_logits=self.k + 1)

    def __call__(self, outputs: Outputs, records: Sequence[Pair]) -> tuple[Tensor, Numbers]:
        """Return the loss of each pair, and its metrics. (R,)"""
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
        """Return the Cringe loss of each rejected completion, summed over its tokens. (R,)"""
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
        losses = cringe(lost.target_logits.values[mask], contrast)
        return torch.stack([t.sum() for t in torch.split(losses, mask.sum(-1).tolist())])

    def _uniforms(self, pair: Pair) -> np.ndarray:
        """Return one number per rejected token, keyed by prompt and tokens, so the batch has no influence."""
        name = f"{pair.prompt.id}:{pair.rejected.token_ids}"
        return row_uniforms(self.seed, name, 0, 0, len(pair.rejected.token_ids))


def contrast_logits(top_logits: Tensor, top_tokens: Tensor, negative: Tensor, uniforms: Tensor) -> Tensor:
    """Return the logit of a token drawn from the softmax of the k largest logits without the negative token.

    Args:
        top_logits: the k + 1 largest logits in descending order, with gradient. (M, k + 1)
        top_tokens: the tokens of these logits. int64 (M, k + 1)
        negative: the tokens to contrast. int64 (M,)
        uniforms: random numbers in [0, 1). float64 (M,)

    Returns:
        The drawn tokens' logits, with the gradient of `top_logits`. (M,)
    """
    same = top_tokens == negative[:, None]
    last = torch.full_like(negative, top_tokens.shape[-1] - 1)
    left_out = torch.where(same.any(-1), same.int().argmax(-1), last)
    rest = top_logits.detach().scatter(-1, left_out[:, None], -torch.inf)
    drawn = draw(rest.softmax(-1), uniforms)
    return top_logits.gather(-1, drawn[:, None])[:, 0]
