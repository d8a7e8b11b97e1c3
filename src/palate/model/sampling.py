"""Drawing the next token from logits: pure functions for all sampling engines.

Rows are independent: the draw of a row depends only on its own logits and its own uniform number.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from palate.config import Sampling
from palate.errors import RunError

BLOCK = 256
"""Number of tokens in a block of the vocabulary, for drawing."""

NOT_FINITE = "the model's logits are not finite, so nothing can be sampled; use --dtype float32"


def row_uniforms(seed: int, prompt_id: str, occurrence: int, sample: int, count: int) -> np.ndarray:
    """Return uniform numbers in [0, 1) for one completion, one per token.

    A counter-based generator with a key per completion: the numbers do not depend on the batch or on the
    order of sampling.

    Args:
        seed: seed of this sampling call.
        prompt_id: `Prompt.id`.
        occurrence: number of earlier occurrences of the same prompt in the call.
        sample: index among the prompt's completions.
        count: number of uniform numbers.

    Returns:
        float64 (count,).
    """
    name = f"{seed}:{prompt_id}:{occurrence}:{sample}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def restricted_logps(
    logits: Tensor, sampling: Sampling, *, seen: Tensor | None = None, barred: Tensor | None = None
) -> Tensor:
    """Return the log-probabilities of the distribution to draw from; -inf for excluded tokens.

    The restrictions apply in the usual order, each to the result of the one before: repetition penalty,
    barred tokens, temperature, top-k, top-p, min-p. At least one token always remains.

    Args:
        logits: the model's logits, float32 (B, V).
        sampling: the options.
        seen: bool (B, V), tokens that the prompt or the completion already has; for the penalty.
        barred: bool (B, V), tokens that are not allowed at this position.

    Returns:
        float32 (B, V); the probabilities of each row sum to one.
    """
    if sampling.repetition_penalty != 1.0 and seen is not None:
        penalised = torch.where(
            logits > 0, logits / sampling.repetition_penalty, logits * sampling.repetition_penalty
        )
        logits = torch.where(seen, penalised, logits)
    if barred is not None:
        logits = logits.masked_fill(barred, -torch.inf)
    if sampling.temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.full_like(logits, -torch.inf).scatter(-1, best, 0.0)
    if sampling.temperature != 1.0:
        logits = logits / sampling.temperature
    if 0 < sampling.top_k < logits.shape[-1]:
        smallest_kept = logits.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probs = ordered.softmax(-1)
        before = probs.cumsum(-1) - probs  # total probability of all likelier tokens
        drop = before >= sampling.top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    if sampling.min_p > 0:
        threshold = logits.amax(-1, keepdim=True) + float(np.log(sampling.min_p))
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits.log_softmax(-1)


def draw(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw one token per row, by the inverse of the cumulative distribution.

    The vocabulary is divided into blocks: the sums of the blocks determine the block, then a token in the
    block is drawn. This equals a draw from one long cumulative sum, at a fraction of its cost.

    Args:
        weights: unnormalised probabilities, float32 (B, V); 0 for excluded tokens.
        uniforms: random numbers in [0, 1), float64 (B,).

    Returns:
        Token ids, int64 (B,).

    Raises:
        RunError: a row's weights are not finite.
    """
    spare = -weights.shape[-1] % BLOCK
    # Padding with zero columns would copy the tensor, too.
    blocks = (torch.nn.functional.pad(weights, (0, spare)) if spare else weights).view(
        len(weights), -1, BLOCK
    )
    cumulative = blocks.sum(-1).double().cumsum(-1)
    if not bool(cumulative[:, -1].isfinite().all()):
        raise RunError(NOT_FINITE)
    # Scaling by the row's actual total prevents a gap above the last token due to rounding.
    target = uniforms[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True)
    before = torch.nn.functional.pad(cumulative, (1, 0)).gather(-1, block)
    inside = blocks[torch.arange(len(blocks), device=blocks.device), block[:, 0]].double()
    place = torch.searchsorted(inside.cumsum(-1), target - before, right=True)
    # The sum within the block may differ in the last bits from the block's sum: stay on an allowed token.
    last = BLOCK - 1 - (inside.flip(-1) > 0).int().argmax(-1, keepdim=True)
    return (block * BLOCK + torch.minimum(place, last))[:, 0]


class Barred(NamedTuple):
    """Tokens that are not allowed at this position in some rows. rows bool (B,), tokens int64 (E,)"""

    rows: Tensor
    tokens: Tensor

    def mask(self, like: Tensor) -> Tensor:
        """Return the mask of tokens that are not allowed. bool (B, V)"""
        mask = torch.zeros_like(like, dtype=torch.bool)
        mask[:, self.tokens] = self.rows[:, None]
        return mask


def choose(
    logits: Tensor,
    sampling: Sampling,
    uniforms: Tensor,
    *,
    seen: Tensor | None = None,
    barred: Barred | None = None,
    overwrite: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw a token per row.

    Args:
        logits: the model's logits, float32 (B, V).
        sampling: the options.
        uniforms: random numbers in [0, 1), float64 (B,).
        seen: as in `restricted_logps`.
        barred: tokens that are not allowed.
        overwrite: the logits are not needed afterwards, so their memory may be used.

    Returns:
        Token ids, their log-probabilities under the model, and under the sampling distribution. (B,)
    """
    if restricts(sampling):
        mask = None if barred is None else barred.mask(logits)
        restricted = restricted_logps(logits, sampling, seen=seen, barred=mask)
        tokens = draw(restricted.exp(), uniforms)
        drawn = _at(restricted, tokens)
        logps = _at(logits, tokens) - logits.logsumexp(-1)
        if not bool(logps.isfinite().all()):  # at temperature 0 no other check would notice
            raise RunError(NOT_FINITE)
        return tokens, logps, drawn
    # With only a temperature, one softmax is enough. Passes over (B, V) are costly, and new memory for their
    # results more so: each takes as long as one or two layers.
    heated = sampling.temperature != 1.0
    scaled = logits / sampling.temperature if heated else logits
    own = heated or overwrite
    if barred is not None:
        scaled, own = scaled if own else scaled.clone(), True
        # Mask before the softmax: after it, all allowed tokens may have underflowed.
        ends = scaled[:, barred.tokens]
        scaled[:, barred.tokens] = ends.masked_fill(barred.rows[:, None], -torch.inf)
        most = scaled.amax(-1)
    weights = torch.softmax(scaled, -1, out=scaled) if own else scaled.softmax(-1)
    tokens = draw(weights, uniforms)
    drawn = _at(weights, tokens).log()
    if heated:
        return tokens, _at(logits, tokens) - logits.logsumexp(-1), drawn
    if barred is None:
        return tokens, drawn, drawn
    # The model's normaliser includes the barred tokens again.
    rest = most - weights.amax(-1).log()
    whole = torch.logaddexp(rest, ends.logsumexp(-1))
    return tokens, torch.where(barred.rows, drawn + rest - whole, drawn), drawn


def _at(values: Tensor, tokens: Tensor) -> Tensor:
    return values.gather(-1, tokens[:, None])[:, 0]


def restricts(sampling: Sampling) -> bool:
    """Return whether the options do more than set a temperature above zero."""
    s = sampling
    return not (
        s.temperature > 0
        and s.top_k == 0
        and s.top_p == 1.0
        and s.min_p == 0.0
        and s.repetition_penalty == 1.0
    )
