"""The plain engine: padded batches and transformers' `generate`, correct for every causal model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext

from palate.config import Sampling
from palate.model.loaded import LoadedModel
from palate.model.outputs import Outputs
from palate.model.passes import Passes
from palate.model.plain.forward import (
    lm_outputs,
    micro_batches,
    row_sizes,
    scalar_outputs,
    value_outputs,
)
from palate.model.plain.generate import generated
from palate.model.rows import Row
from palate.types import Record


class PlainEngine:
    """An engine that computes like transformers; see `Engine` for the methods."""

    def fill(self, model: LoadedModel, groups: Sequence[list[Row]], sampling: Sampling) -> Iterator[int]:
        """Fill rows with `generate`; prompts are repeated and padded."""
        return generated(model, groups, sampling)

    def computing(self, model: LoadedModel) -> AbstractContextManager[None]:
        """Return a context that does nothing."""
        return nullcontext()

    def outputs(
        self, model: LoadedModel, records: Sequence[Record], *, statistics: bool = False, top_logits: int = 0
    ) -> Outputs:
        """Compute log-probabilities in a padded batch."""
        return lm_outputs(model, records, statistics=statistics, top_logits=top_logits)

    def scores(self, model: LoadedModel, records: Sequence[Record]) -> Outputs:
        """Compute scores in a padded batch."""
        return scalar_outputs(model, records)

    def values(self, model: LoadedModel, records: Sequence[Record]) -> Outputs:
        """Compute values in a padded batch."""
        return value_outputs(model, records)

    def batches(self, model: LoadedModel, records: Sequence[Record], budget: int) -> list[list[int]]:
        """Return indices of records of similar length; padding counts."""
        return micro_batches(row_sizes(records, model.codec), budget)

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """Return the number of rows times the longest row: every completion repeats the prompt."""
        return len(completions) * (prompt + max(completions))

    def passes(self, model: LoadedModel) -> Passes:
        """Return the passes in plain torch."""
        return Passes()
