"""Outputs of completions from packed rows (see `layout`), and the selection of records to pack together."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from palate.model.fast.head import LMHead
from palate.model.fast.layout import PackedLayout, ending, positions, predicting
from palate.model.fast.lean import states_of
from palate.model.fast.native import Library
from palate.model.fast.native_head import native_values
from palate.model.fast.native_layers import NativeOperations
from palate.model.fast.segments import Shape
from palate.model.heads import scores_of
from palate.model.loaded import LoadedModel
from palate.model.outputs import Outputs, ragged
from palate.types import Record


def packed_outputs(
    model: LoadedModel,
    head: LMHead,
    records: Sequence[Record],
    *,
    statistics: bool = False,
    top_logits: int = 0,
    library: Library | None = None,
) -> Outputs:
    """Return float32 log-probabilities of the completions' tokens from one packed row; see `Engine.outputs`.

    With a library, its compiled functions compute what lies between the products.

    The caller keeps `following(model.network)` open until backward has finished.
    """
    hidden, shape = _hidden(model, records, library)
    tokens = [t for r in records for c in r.completions for t in c.token_ids]
    targets = torch.tensor(tokens, device=model.device)
    predicted_from = hidden.index_select(0, predicting(shape).to(model.device))
    if library is None or top_logits or head.bias is not None or head.softcap is not None:
        values = head.values(predicted_from, targets, statistics=statistics, top_logits=top_logits)
    else:
        values = native_values(predicted_from, head.weight, targets, library, statistics=statistics)
    return Outputs.of(values, [size for _, sizes in shape for size in sizes], statistics=statistics)


def packed_scores(
    model: LoadedModel, records: Sequence[Record], *, library: Library | None = None
) -> Outputs:
    """Return a scalar head's output for each completion, from one packed row; see `Engine.scores`."""
    hidden, shape = _hidden(model, records, library)
    last = hidden.index_select(0, ending(shape).to(model.device))
    return Outputs(scores=scores_of(model.network, last))


def packed_values(
    model: LoadedModel, records: Sequence[Record], *, library: Library | None = None
) -> Outputs:
    """A value head's output before each token of the completions, from one packed row; as `Engine.values`."""
    hidden, shape = _hidden(model, records, library)
    before = hidden.index_select(0, predicting(shape).to(model.device))
    sizes = [size for _, completions in shape for size in completions]
    return Outputs(values=ragged(torch.split(scores_of(model.network, before), sizes)))


def _hidden(model: LoadedModel, records: Sequence[Record], library: Library | None) -> tuple[Tensor, Shape]:
    """Return the hidden states of a packed row, (L, H), and its shape."""
    codec = model.codec
    shape = [(len(codec.prompt_ids(r.prompt)), [len(c.token_ids) for c in r.completions]) for r in records]
    ids = [
        t
        for r in records
        for part in (codec.prompt_ids(r.prompt), *(c.token_ids for c in r.completions))
        for t in part
    ]
    operations = None if library is None else NativeOperations(library)
    states = states_of(model.network, operations=operations)
    hidden = states(torch.tensor([ids]), positions(shape), PackedLayout(shape))
    return hidden[0], shape


def packed_batches(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Return indices of records to pack together: as few rows as the budget allows, about equally long.

    Equal rows need the least memory, and long products use a processor best.

    Args:
        sizes: number of tokens of each record: its prompt once, and all its completions.
        budget: most tokens in a packed row; a longer record is packed alone.
    """
    order = sorted(range(len(sizes)), key=lambda i: (sizes[i], i))
    rows = _filled(sizes, order, budget)
    # The smallest budget that needs no more rows.
    low, high = 1, budget
    while low < high:
        middle = (low + high) // 2
        fewer = _filled(sizes, order, middle)
        if len(fewer) > len(rows):
            low = middle + 1
        else:
            rows, high = fewer, middle
    return rows


def _filled(sizes: Sequence[int], order: Sequence[int], budget: int) -> list[list[int]]:
    """Return the records in rows of at most `budget` tokens, each filled in turn."""
    rows: list[list[int]] = []
    tokens = 0
    for i in order:
        if not rows or tokens + sizes[i] > budget:
            rows.append([])
            tokens = 0
        rows[-1].append(i)
        tokens += sizes[i]
    return rows
