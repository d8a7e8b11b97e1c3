"""A frozen policy that can sample and score while the live policy changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch

from palate.config import Sampling
from palate.memory import Memory, Purpose, key_of
from palate.model.batched import batched_logps
from palate.model.loaded import LoadedModel
from palate.model.outputs import TokenValues, ragged
from palate.model.rollouts import Drawn, Observer, begin, unobserved
from palate.types import Group, Prompt, Record

Weights = Callable[[], AbstractContextManager[LoadedModel]]
"""Opens the snapshot's weights: the live weights, the base without its adapter, or a copy."""


class Snapshot:
    """The policy at one version.

    While the live policy has that version, a snapshot shares its weights and costs no memory. When the
    policy changes, each snapshot that is still referenced gets its own weights: the base model without its
    adapter if that is the same function, a copy of the adapter, or a copy of the model.
    """

    def __init__(
        self,
        version: int,
        weights: Weights,
        *,
        micro_batch_tokens: int,
        observe: Observer = unobserved,
        memory: Callable[[], Memory | None] = lambda: None,
        name: str = "policy",
    ) -> None:
        self.version = version
        self._weights = weights
        self._budget = micro_batch_tokens
        self._observe = observe
        self._memory = memory
        self._name = name
        self._known_only = False

    @property
    def has_memory(self) -> bool:
        """True within a run, whose memory stores samples and log-probabilities."""
        return self._memory() is not None

    @torch.no_grad()
    def sample(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        *,
        seed: int,
        purpose: Purpose = "completion",
        finished: Callable[[Group], None] | None = None,
    ) -> list[Group]:
        """Sample n completions of each prompt, with log-probabilities.

        The same (seed, prompt, index) draws the same uniform numbers in any batch. Within a run, a second
        call with the same arguments returns the completions that the run has stored.

        Args:
            prompts: the prompts to answer.
            n: number of completions per prompt.
            sampling: the options.
            seed: seed of the draws.
            purpose: the use of the texts; a run exports only completions of the policy.
            finished: receives each group as soon as its completions are finished, unless they were stored.

        Raises:
            DataError: a prompt is too long to leave room for new tokens.
            RunError: the snapshot is `recalled`, and the memory lacks the completions.
        """
        return self.begin(prompts, n, sampling, seed=seed, purpose=purpose, finished=finished).groups()

    @torch.no_grad()
    def begin(
        self,
        prompts: Sequence[Prompt],
        n: int,
        sampling: Sampling,
        *,
        seed: int,
        purpose: Purpose = "completion",
        finished: Callable[[Group], None] | None = None,
    ) -> Drawn:
        """Begin to sample, as `sample` does; if a server samples, the policy may learn meanwhile."""
        with self._weights() as model:
            return begin(
                model,
                prompts,
                n,
                sampling,
                seed=seed,
                version=self.version,
                observe=self._observe,
                memory=self._memory(),
                name=self._name,
                purpose=purpose,
                finished=finished,
                known_only=self._known_only,
            )

    def recalled(self, version: int) -> Snapshot:
        """Return an earlier version, whose weights are gone: it only returns completions from the memory."""
        earlier = Snapshot(
            version,
            self._weights,
            micro_batch_tokens=self._budget,
            observe=self._observe,
            memory=self._memory,
            name=self._name,
        )
        earlier._known_only = True
        return earlier

    @torch.no_grad()
    def logps(self, records: Sequence[Record], *, kept: bool = False) -> TokenValues:
        """Return the log-probability of each completion token of the records. (N, T), no gradient.

        Args:
            records: prompts with completions, N completions in total.
            kept: read them from the run's memory if it has all of them, and store them there.
        """
        with self._weights() as model:
            memory = self._memory() if kept else None
            if memory is None:
                return batched_logps(model, records, self._budget)
            keys = [
                key_of("logps", self._name, self.version, model.codec.prompt_ids(r.prompt), c.token_ids)
                for r in records
                for c in r.completions
            ]
            if memory.logps(keys) is None:
                rows = batched_logps(model, records, self._budget).rows()
                fresh = {key: row.cpu().numpy() for key, row in zip(keys, rows, strict=True)}
                memory.keep_logps(self.version, fresh)
            known = memory.logps(keys)
            assert known is not None, "all keys have just been stored"
            return ragged([torch.tensor(row, device=model.device) for row in known])
