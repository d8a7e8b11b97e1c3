"""The parts of a batch: the reference's rows of each record, and a key by which processes compare batches."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from palate.learn.objective import Reference
from palate.memory import key_of
from palate.model import TokenValues, ragged
from palate.types import Record
from palate.world import current, own_part


def reference_rows(ref: Reference | None, records: Sequence[Record]) -> list[list[Tensor]] | None:
    """Return the reference's log-probabilities of this process's records; None without a reference.

    They are computed before the update's own, in the same micro-batches, so policy and reference agree to the
    last bit before the first step.

    Returns:
        For each record of this process, a tensor (t,) for each of its completions.
    """
    if ref is None:
        return None
    rows = iter(ref.logps(records).rows())
    return list(own_part([[next(rows) for _ in record.completions] for record in records]))


def rows_at(rows: list[list[Tensor]] | None, batch: Sequence[int]) -> TokenValues | None:
    """Return the rows of a micro-batch, given by the indices of its records."""
    return None if rows is None else ragged([row for i in batch for row in rows[i]])


def batch_key(records: Sequence[Record], version: int) -> str:
    """Return a key of a batch and of the version that learns from it; empty for a single process."""
    if current().size == 1:
        return ""
    return key_of(version, [(r.prompt.id, [c.token_ids for c in r.completions]) for r in records])
