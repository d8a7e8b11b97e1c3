"""From next-token logits to the next token: pure functions, the same for every sampling engine.

Rows never mix: what a row draws depends on its own logits and its own uniform number alone.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from palate.config import Sampling


def row_uniforms(seed: int, prompt_id: str, occurrence: int, sample: int, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1) for one completion, one per token.

    A counter-based generator keyed by who draws: the numbers are the same whatever shares the batch,
    and in whatever order things are sampled.

    Args:
        seed: of this sampling call.
        prompt_id: `Prompt.id`.
        occurrence: how often the same prompt came before in the call.
        sample: index among the prompt's completions.
        count: how many numbers.

    Returns:
        float64 (count,).
    """
    name = f"{seed}:{prompt_id}:{occurrence}:{sample}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def restricted_logps(
    logits: Tensor, sampling: Sampling, *, seen: Tensor | None = None, barred: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the distribution to draw from; -inf on tokens that cannot come.

    In the usual order: repetition penalty, barred tokens, temperature, top-k, top-p, min-p, each on what
    the one before left. At least one token always stays.

    Args:
        logits: the model's, float32 (B, V).
        sampling: the options.
        seen: bool (B, V), tokens that the prompt or the completion already has; for the penalty.
        barred: bool (B, V), tokens that must not come now.

    Returns:
        float32 (B, V), each row summing to one in probability.
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
        before = probs.cumsum(-1) - probs  # probability of everything likelier
        drop = before >= sampling.top_p
        logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
    if sampling.min_p > 0:
        threshold = logits.amax(-1, keepdim=True) + float(np.log(sampling.min_p))
        logits = logits.masked_fill(logits < threshold, -torch.inf)
    return logits.log_softmax(-1)


def draw(logps: Tensor, uniforms: Tensor) -> Tensor:
    """One token per row, by the inverse of the cumulative distribution.

    Args:
        logps: float32 (B, V); -inf where a token cannot come.
        uniforms: in [0, 1), float64 (B,).

    Returns:
        Token ids, int64 (B,).
    """
    cumulative = logps.double().exp().cumsum(-1)
    # Scaled by the row's own total: rounding must not leave a gap above the last token.
    target = uniforms[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0]
