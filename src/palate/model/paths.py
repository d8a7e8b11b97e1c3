"""Log-probabilities and scores by the fast way where a model has one, by the plain way elsewhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from palate.model.fast.attention import following
from palate.model.fast.packed import packed_batches, packed_outputs, packed_scores
from palate.model.load import LoadedModel
from palate.model.plain.forward import (
    Outputs,
    TokenValues,
    lm_outputs,
    micro_batches,
    ragged,
    row_sizes,
    scalar_outputs,
)
from palate.model.widened import widening
from palate.types import Record


@contextmanager
def computing(model: LoadedModel) -> Iterator[None]:
    """Open around `completion_outputs`, and until backward is done."""
    with widening(model.network), nullcontext() if model.fast is None else following(model.network):
        yield


def completion_outputs(
    model: LoadedModel, records: Sequence[Record], *, statistics: bool = False, top_logits: int = 0
) -> Outputs:
    """Log-probabilities of the completions' tokens; see `lm_outputs`."""
    if model.fast is None:
        return lm_outputs(model, records, statistics=statistics, top_logits=top_logits)
    return packed_outputs(model, model.fast.head, records, statistics=statistics, top_logits=top_logits)


def completion_scores(model: LoadedModel, records: Sequence[Record]) -> Outputs:
    """A scalar head's number for each completion; see `scalar_outputs`."""
    return scalar_outputs(model, records) if model.fast is None else packed_scores(model, records)


def batches(model: LoadedModel, records: Sequence[Record], budget: int) -> list[list[int]]:
    """Indices of records to compute together, at most `budget` tokens each, padding included if there is any.

    They follow from lengths alone. A record is never divided; a larger one goes alone.
    """
    sizes = row_sizes(records, model.codec)
    if model.fast is None:
        return micro_batches(sizes, budget)
    prompts = [len(model.codec.prompt_ids(record.prompt)) for record in records]
    return packed_batches([sum(s) - (len(s) - 1) * p for s, p in zip(sizes, prompts, strict=True)], budget)


def batched_scores(model: LoadedModel, records: Sequence[Record], budget: int) -> Tensor:
    """A scalar head's number for each completion, in micro-batches, in the records' order. (N,)"""
    found: dict[int, Tensor] = {}
    with computing(model):
        for batch in batches(model, records, budget):
            scores = completion_scores(model, [records[i] for i in batch]).scores
            assert scores is not None
            parts = torch.split(scores, [len(records[i].completions) for i in batch])
            found |= dict(zip(batch, parts, strict=True))
    return torch.cat([found[i] for i in sorted(found)])


def batched_logps(model: LoadedModel, records: Sequence[Record], budget: int) -> TokenValues:
    """Log-probabilities in micro-batches of at most `budget` tokens, in the records' order."""
    found: dict[int, list[Tensor]] = {}
    with computing(model):
        for batch in batches(model, records, budget):
            logps = completion_outputs(model, [records[i] for i in batch]).logps
            assert logps is not None
            rows = iter(logps.rows())
            for i in batch:
                found[i] = [next(rows) for _ in records[i].completions]
    return ragged([row for i in sorted(found) for row in found[i]])
