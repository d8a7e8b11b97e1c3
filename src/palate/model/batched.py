"""Scores and log-probabilities of many records, computed in micro-batches, in the records' order.

Several processes compute each a part of the records, and all get the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from palate.model.loaded import LoadedModel
from palate.model.outputs import TokenValues, ragged
from palate.types import Record
from palate.world import current, shared_rows

Rows = list[list[Tensor]]
"""A tensor for each completion of each record."""


def batched_scores(model: LoadedModel, records: Sequence[Record], budget: int) -> Tensor:
    """Compute a scalar head's scores in micro-batches of at most `budget` tokens. (N,)"""

    def scores(part: Sequence[Record]) -> list[Tensor]:
        made = model.scores(part).scores
        assert made is not None
        return list(made)

    return torch.stack([score for own in _batched(model, records, budget, scores) for score in own])


def batched_logps(model: LoadedModel, records: Sequence[Record], budget: int) -> TokenValues:
    """Compute log-probabilities in micro-batches of at most `budget` tokens. (N, T)"""
    return _tokens(_batched(model, records, budget, lambda part: _rows(model.outputs(part).logps)))


def batched_values(model: LoadedModel, records: Sequence[Record], budget: int) -> TokenValues:
    """Compute a value head's values in micro-batches of at most `budget` tokens. (N, T)"""
    return _tokens(_batched(model, records, budget, lambda part: _rows(model.values(part).values)))


def _rows(values: TokenValues | None) -> list[Tensor]:
    assert values is not None
    return values.rows()


def _tokens(rows: Rows) -> TokenValues:
    return ragged([row for own in rows for row in own])


def _batched(
    model: LoadedModel,
    records: Sequence[Record],
    budget: int,
    compute: Callable[[Sequence[Record]], list[Tensor]],
) -> Rows:
    """Return what `compute` returns for the completions of each record."""

    def computed(part: Sequence[Record]) -> Rows:
        by_record: dict[int, list[Tensor]] = {}
        with model.computing():
            for batch in rounds(model, model.batches(part, budget)):
                rows = iter(compute([part[i] for i in batch] if batch else records[:1]))
                for i in batch:
                    by_record[i] = [next(rows) for _ in part[i].completions]
        return [by_record[i] for i in range(len(part))]

    if current().size == 1:
        return computed(records)
    rows = shared_rows(
        "values of records",
        records,
        lambda own: [[row.cpu().numpy() for row in completions] for completions in computed(own)],
    )
    return [[torch.from_numpy(row).to(model.device) for row in completions] for completions in rows]


def rounds(model: LoadedModel, batches: list[list[int]]) -> list[list[int]]:
    """Return the micro-batches of this process, with empty ones to fill up to the longest list of all.

    All processes gather a sharded model's weights at the same time, so each takes part in every pass: at an
    empty micro-batch, with a record whose result does not count.
    """
    if not model.sharded:
        return batches
    most = max(current().gather("micro-batches", len(batches)))
    return batches + [[]] * (most - len(batches))
