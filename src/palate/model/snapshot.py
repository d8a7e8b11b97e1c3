"""A frozen policy that can sample and score, whatever becomes of the live one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from palate.config import Sampling
from palate.journal import Journal, key_of
from palate.model.engine import Observer, sample, unobserved
from palate.model.load import LoadedModel
from palate.model.paths import batched_logps
from palate.model.plain.forward import TokenValues, ragged
from palate.types import Group, Prompt, Record

Weights = Callable[[], AbstractContextManager[LoadedModel]]
"""Opens the snapshot's weights for use: the live ones, the base under its adapter, or a copy."""


class Snapshot:
    """The policy as it was at one version.

    While that version is the live one, a snapshot shares the live weights and costs nothing. When the
    policy moves on, the snapshots still held are given weights of their own: the adapter switched off
    where that is the same function, a copy of the adapter, or a copy of the model.
    """

    def __init__(
        self,
        version: int,
        weights: Weights,
        *,
        micro_batch_tokens: int,
        observe: Observer = unobserved,
        journal: Callable[[], Journal | None] = lambda: None,
        name: str = "policy",
    ) -> None:
        self.version = version
        self._weights = weights
        self._budget = micro_batch_tokens
        self._observe = observe
        self._journal = journal
        self._name = name

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        *,
        seed: int,
    ) -> list[Group]:
        """n completions of each prompt, with log-probabilities.

        The same (seed, prompt, index) draws the same uniform numbers, whatever shares the batch. Within a
        run, what has been sampled before with the same arguments is taken from its journal.

        Raises:
            DataError: a prompt leaves no room for the new tokens.
        """
        with self._weights() as model:
            return sample(
                model,
                prompts,
                n,
                sampling,
                seed=seed,
                version=self.version,
                observe=self._observe,
                journal=self._journal(),
                name=self._name,
            )

    @torch.no_grad()
    def logps(self, records: Sequence[Record], *, kept: bool = False) -> TokenValues:
        """Log-probability of every token of the records' completions, in order. (N, T), no gradient.

        Args:
            records: prompts with completions, N completions in all.
            kept: take them from the run's journal where they are all there, and keep them there.
        """
        with self._weights() as model:
            journal = self._journal() if kept else None
            if journal is None:
                return batched_logps(model, records, self._budget)
            keys = [
                key_of("logps", self._name, self.version, model.codec.prompt_ids(r.prompt), c.token_ids)
                for r in records
                for c in r.completions
            ]
            if journal.logps(keys) is None:
                found = batched_logps(model, records, self._budget).rows()
                fresh = {key: row.cpu().numpy() for key, row in zip(keys, found, strict=True)}
                journal.keep_logps(self.version, fresh)
            known = journal.logps(keys)
            assert known is not None, "they have just been kept"
            return ragged([torch.tensor(row, device=model.device) for row in known])
