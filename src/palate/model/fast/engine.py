"""The fast engine: packed rows without padding; each prompt is computed once for all its completions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from palate.config import Sampling
from palate.model.compiling import say_plain
from palate.model.fast.attention import following
from palate.model.fast.decode import Decoder
from palate.model.fast.fused import Fused, can_fuse
from palate.model.fast.head import LMHead
from palate.model.fast.merge import MergedCopy, can_merge
from palate.model.fast.native import Library, library_of
from palate.model.fast.native_passes import NativePasses
from palate.model.fast.native_products import packing_of
from palate.model.fast.native_step import NativeStep, steps_of
from palate.model.fast.packed import packed_batches, packed_outputs, packed_scores, packed_values
from palate.model.loaded import LoadedModel
from palate.model.outputs import Outputs
from palate.model.passes import Passes
from palate.model.rows import Row
from palate.types import Record


class FastEngine:
    """An engine for models that `disagreement` accepts; see `Engine` for the methods."""

    def __init__(self) -> None:
        self._merged: MergedCopy | None = None
        self._fused: Fused | None = None
        self._version: tuple[int, int, bool, str] | None = None

    @torch.no_grad()
    def fill(self, model: LoadedModel, groups: Sequence[list[Row]], sampling: Sampling) -> Iterator[int]:
        """Fill rows; prompts are computed once, finished rows leave the batch, and new prompts refill it."""
        if not groups:
            return
        fused = self.fused(model)
        network = self.sampling_network(model) if fused is None else model.network
        most = sampling.sampling_rows or sum(map(len, groups))
        groups = [group[i : i + most] for group in groups for i in range(0, len(group), most)]
        n = len(groups[0])
        slots = min(len(groups), max(1, most // n))
        decoder = Decoder(
            network,
            _head(network),
            model.codec,
            sampling,
            slots=slots,
            rows=n,
            longest=max(len(group[0].prompt_ids) for group in groups),
            fused=fused,
            compiled=_compiled(model, fused),
        )
        yield from decoder.run(iter(groups))

    def sampling_network(self, model: LoadedModel) -> Any:
        """Return the live network, or a copy with the LoRA adapter merged into its weights."""
        if model.peft is None or model.adapter_off or not can_merge(model.network):
            return model.network
        if self._merged is None or self._merged.network is not model.network:
            self._merged = MergedCopy(model.network)
        return self._merged.at(model.revision)

    def fused(self, model: LoadedModel) -> Fused | None:
        """Return the network's current weights packed for sampling; None if they cannot be packed.

        They are kept until the weights change, or until a pass with gradient, which needs the memory itself.
        """
        network = model.network
        if not can_fuse(network):
            return None
        # torch counts the changes of each tensor, too; `parameter.data = ...` is in the revision alone.
        changes = sum(parameter._version for parameter in network.parameters())
        version = model.revision, changes, model.adapter_off, model.compiles
        if self._fused is None or self._fused.network is not network or self._version != version:
            self._fused = None  # free the old copy first
            library = library_of(network) if model.compiles == "on" else None
            self._fused, self._version = Fused(network, packing_of(library)), version
        return self._fused

    def computing(self, model: LoadedModel) -> AbstractContextManager[None]:
        """Return the context in which the network's layers follow layouts."""
        if torch.is_grad_enabled():
            self._fused = None
            if self._merged is not None and self._merged.network is not model.network:
                self._merged = None  # of a gathered copy, which is freed as well
        return following(model.network)

    def outputs(
        self, model: LoadedModel, records: Sequence[Record], *, statistics: bool = False, top_logits: int = 0
    ) -> Outputs:
        """Compute log-probabilities from one packed row."""
        head = _head(model.network)
        library = _library(model)
        return packed_outputs(
            model, head, records, statistics=statistics, top_logits=top_logits, library=library
        )

    def scores(self, model: LoadedModel, records: Sequence[Record]) -> Outputs:
        """Compute scores from one packed row."""
        return packed_scores(model, records, library=_library(model))

    def values(self, model: LoadedModel, records: Sequence[Record]) -> Outputs:
        """Compute values in one packed row."""
        return packed_values(model, records, library=_library(model))

    def batches(self, model: LoadedModel, records: Sequence[Record], budget: int) -> list[list[int]]:
        """Return indices of records of similar length, without padding."""
        prompts = [len(model.codec.prompt_ids(record.prompt)) for record in records]
        completions = [[len(c.token_ids) for c in record.completions] for record in records]
        sizes = [self.tokens(prompt, rest) for prompt, rest in zip(prompts, completions, strict=True)]
        return packed_batches(sizes, budget)

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """Return the number of tokens of the prompt, once, plus those of all completions."""
        return prompt + sum(completions)

    def passes(self, model: LoadedModel) -> Passes:
        """Return compiled passes if the model's layers are compiled."""
        library = _library(model)
        return Passes() if library is None else NativePasses(library)


def _compiled(model: LoadedModel, fused: Fused | None) -> NativeStep | None:
    """Return the compiled sampling step; None for the plain way."""
    if model.compiles != "on" or (library := library_of(model.network)) is None:
        return None
    if fused is None:
        say_plain(
            f"sampling from {model.source} is not compiled: its weights cannot be packed, because of their "
            "size or of its adapters"
        )
        return None
    return steps_of(fused, library)


def _library(model: LoadedModel) -> Library | None:
    """Return the compiled functions for a learner; None for the plain way."""
    if model.compiles != "on" or model.computes_in is not None:
        return None
    return library_of(model.network)


def _head(network: Any) -> LMHead:
    head = LMHead.of(network)
    assert head is not None, "language models on the fast engine have a linear head"
    return head
