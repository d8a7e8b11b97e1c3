"""Scores and log-probabilities of many records, computed in micro-batches, in the records' order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palate.model.loaded import LoadedModel
from palate.model.outputs import TokenValues, ragged
from palate.types import Record


def batched_scores(model: LoadedModel, records: Sequence[Record], budget: int) -> Tensor:
    """Compute a scalar head's scores in micro-batches of at most `budget` tokens. (N,)"""
    by_record: dict[int, Tensor] = {}
    with model.computing():
        for batch in model.batches(records, budget):
            scores = model.scores([records[i] for i in batch]).scores
            assert scores is not None
            parts = torch.split(scores, [len(records[i].completions) for i in batch])
            by_record |= dict(zip(batch, parts, strict=True))
    return torch.cat([by_record[i] for i in sorted(by_record)])


def batched_logps(model: LoadedModel, records: Sequence[Record], budget: int) -> TokenValues:
    """Compute log-probabilities in micro-batches of at most `budget` tokens. (N, T)"""
    return _batched(model, records, budget, lambda part: model.outputs(part).logps)


def batched_values(model: LoadedModel, records: Sequence[Record], budget: int) -> TokenValues:
    """Compute a value head's values in micro-batches of at most `budget` tokens. (N, T)"""
    return _batched(model, records, budget, lambda part: model.values(part).values)


def _batched(
    model: LoadedModel,
    records: Sequence[Record],
    budget: int,
    compute: Callable[[Sequence[Record]], TokenValues | None],
) -> TokenValues:
    by_record: dict[int, list[Tensor]] = {}
    with model.computing():
        for batch in model.batches(records, budget):
            made = compute([records[i] for i in batch])
            assert made is not None
            rows = iter(made.rows())
            for i in batch:
                by_record[i] = [next(rows) for _ in records[i].completions]
    return ragged([row for i in sorted(by_record) for row in by_record[i]])
