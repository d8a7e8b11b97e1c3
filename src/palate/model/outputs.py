"""Outputs of a forward pass over records: numbers per token and per completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from palate.model.heads import HeadValues


@dataclass(frozen=True)
class TokenValues:
    """A number for each token of N completions.

    Attributes:
        values: float32 (N, T), zero if `mask` is False.
        mask: bool (N, T), True on completion tokens, including the end token.
    """

    values: Tensor
    mask: Tensor

    def sum(self) -> Tensor:
        """Return the sum over the tokens of each completion. (N,)"""
        return self.values.sum(-1)

    def mean(self) -> Tensor:
        """Return the mean over the tokens of each completion. (N,)"""
        return self.values.sum(-1) / self.mask.sum(-1)

    def rows(self) -> list[Tensor]:
        """Return the numbers of each completion without padding: N tensors (t,)."""
        return [row[mask] for row, mask in zip(self.values, self.mask, strict=True)]

    def take(self, index: Tensor) -> TokenValues:
        """Return the numbers of some of the completions. index int64 (n,)"""
        return TokenValues(self.values[index], self.mask[index])


@dataclass(frozen=True)
class Outputs:
    """Outputs of a forward pass for the N completions of some records, in order.

    Attributes:
        logps: log-probability of each token; carries gradient.
        entropy: entropy of the model's distribution at each token, in nats; no gradient.
        top1: 1 if the token was the likeliest, else 0; no gradient.
        scores: output of a scalar head at the last token. float32 (N,); carries gradient.
        values: output of a value head for the state before each token; carries gradient.
        ref_logps: log-probability of each token under the reference; no gradient.
        target_logits: logit of each token, soft cap included; carries gradient. This and the next two are
            only computed for an objective that needs `top_logits`.
        top_logits: the K largest logits at each token's position, in descending order. float32 (N, T, K),
            zero for padding; carries gradient.
        top_tokens: tokens of the largest logits. int64 (N, T, K)
        version: the learner's version for an update; None for a measurement.
    """

    logps: TokenValues | None = None
    entropy: TokenValues | None = None
    top1: TokenValues | None = None
    scores: Tensor | None = None
    values: TokenValues | None = None
    ref_logps: TokenValues | None = None
    target_logits: TokenValues | None = None
    top_logits: Tensor | None = None
    top_tokens: Tensor | None = None
    version: int | None = None

    @classmethod
    def of(cls, values: HeadValues, counts: Sequence[int], *, statistics: bool) -> Outputs:
        """Arrange the head's values by completion.

        Args:
            values: values of the M tokens of all completions, one after the other.
            counts: number of tokens of each of the N completions.
            statistics: include entropy and top1.
        """

        def spread(flat: Tensor) -> TokenValues:
            return ragged(torch.split(flat, list(counts)))

        has_top = values.top_logits.shape[-1] > 0
        return cls(
            logps=spread(values.logps),
            entropy=spread(values.entropy) if statistics else None,
            top1=spread(values.top1) if statistics else None,
            target_logits=spread(values.logits) if has_top else None,
            top_logits=spread(values.top_logits).values if has_top else None,
            top_tokens=spread(values.top_tokens).values if has_top else None,
        )

    def take(self, index: Tensor) -> Outputs:
        """Return the outputs of some of the completions. index int64 (n,)"""
        taken: dict[str, Any] = {
            name: value.take(index) if isinstance(value, TokenValues) else value[index]
            for name, value in vars(self).items()
            if isinstance(value, TokenValues | Tensor)
        }
        return replace(self, **taken)


def ragged(rows: Sequence[Tensor]) -> TokenValues:
    """Pad rows of different lengths into one tensor with its mask; a row is (t,) or (t, K)."""
    counts = torch.tensor([len(row) for row in rows], device=rows[0].device)
    values = pad_sequence(list(rows), batch_first=True)
    return TokenValues(values, torch.arange(values.shape[1], device=values.device)[None] < counts[:, None])
