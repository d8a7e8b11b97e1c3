"""A loaded model, and the protocol of the engines that compute with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import nn

from palate.config import Sampling
from palate.model.codec import Codec
from palate.model.outputs import Outputs
from palate.model.passes import Passes
from palate.model.rows import Row
from palate.types import Record

T = TypeVar("T")

Head = Literal["lm", "scalar", "value"]
"""Token probabilities, one number per completion, or one number per token."""


class SamplingEngine(Protocol):
    """Samples completions from a model."""

    def fill(self, model: LoadedModel, groups: Sequence[list[Row]], sampling: Sampling) -> Iterator[int]:
        """Fill rows with sampled tokens, without gradient.

        Args:
            model: the model to sample from; `model.revision` changes when its weights change.
            groups: rows without tokens; the rows of a group answer the same prompt.
            sampling: the options; at most `sampling.sampling_rows` rows are sampled in parallel.

        Yields:
            The number of new tokens of each step.
        """


Fill = Callable[[Sequence[list[Row]], Sampling], Iterator[int]]
"""Fills rows with sampled tokens, as `SamplingEngine.fill` does, from fixed weights."""


class Weights(Protocol):
    """Weights of a model that another program samples from."""

    def begin(self, work: Callable[[Fill], T]) -> Future[T]:
        """Call a function in the background, with the function that samples from these weights."""


class Sampler(Protocol):
    """Samples instead of a model's engine, in another program, so that this one can do other work meanwhile.

    Its completions are not those of the engine, and its log-probabilities differ from the model's by
    rounding.
    """

    @property
    def identity(self) -> str:
        """The engine, its version and its settings, as part of the memory's keys."""

    def publish(self, model: LoadedModel) -> Weights:
        """Make the model's current weights available to the program; a collective."""

    def close(self) -> None:
        """Stop sampling, and free what it takes."""


class Engine(SamplingEngine, Protocol):
    """Samples from a model and computes outputs of records; chosen once, when the model is loaded."""

    def computing(self, model: LoadedModel) -> AbstractContextManager[None]:
        """Return a context for `outputs` and `scores`; keep it open until backward has finished."""

    def outputs(
        self, model: LoadedModel, records: Sequence[Record], *, statistics: bool = False, top_logits: int = 0
    ) -> Outputs:
        """Compute log-probabilities of the completions' tokens, in float32, for N completions in all.

        Args:
            model: a causal language model.
            records: prompts with completions.
            statistics: also compute entropy and top1.
            top_logits: number of the largest logits to return at each token's position, together with the
                token's own logit.
        """

    def scores(self, model: LoadedModel, records: Sequence[Record]) -> Outputs:
        """Compute a scalar head's output at the last token of each completion. `Outputs.scores` is (N,)."""

    def values(self, model: LoadedModel, records: Sequence[Record]) -> Outputs:
        """Compute a value head's output before each token of the completions. `Outputs.values` is (N, T)."""

    def batches(self, model: LoadedModel, records: Sequence[Record], budget: int) -> list[list[int]]:
        """Return indices of records to compute together, at most `budget` tokens each, padding included.

        The batches depend only on lengths. A record is never split; a record above the budget is its own
        batch.
        """

    def tokens(self, prompt: int, completions: Sequence[int]) -> int:
        """Return the number of tokens of one record, padding included, from the lengths of its parts."""

    def passes(self, model: LoadedModel) -> Passes:
        """Return what computes the passes over gradients and weights of an update."""


@dataclass
class LoadedModel:
    """A network with all parts that are needed to compute with it and to save it.

    Attributes:
        network: the transformers model; with LoRA, it contains the adapter's layers.
        codec: the tokenizer with the chat template.
        head: `lm` for a language model, `scalar` for a reward model, `value` for a value function.
        source: the name used to load the model.
        engine: samples from the network and computes its outputs.
        peft: peft's wrapper of the network, which can switch the adapter off and save it; None without an
            adapter.
        fresh_adapter: True if the adapter was created at loading, so that it starts as zero: version 0
            computes the same with and without it.
        whole_embeddings: True if the adapter comes with whole embeddings, because tokens were added.
        revision: number of changes of the weights; code that changes the weights must add one.
        adapter_off: True while the adapter is switched off.
        sharded: True if the weights are divided among the processes.
        computes_in: number format of the layers, if that of the weights differs.
        chunk_rows: the option `sampling_rows` that decides the chunks of samples: that of a run's first
            start, so that a run which resumes with another option finds its samples. 0 for its default, None
            for the option of each call.
        compiles: `on` if the engine uses compiled functions where it can.
        sampler: samples instead of the engine, for a policy whose completions come from a server.
    """

    network: Any
    codec: Codec
    head: Head
    source: str
    engine: Engine
    peft: Any | None = None
    fresh_adapter: bool = False
    whole_embeddings: bool = False
    revision: int = 0
    adapter_off: bool = False
    sharded: bool = False
    computes_in: torch.dtype | None = None
    chunk_rows: int | None = None
    compiles: Literal["off", "on"] = "off"
    sampler: Sampler | None = None
    _dropout: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def keeps_logits(self) -> bool:
        """True if the network can compute the logits of selected positions only."""
        return "logits_to_keep" in inspect.signature(self.network.forward).parameters

    @property
    def device(self) -> torch.device:
        """The device of the inputs."""
        return torch.device(self.network.device)

    @property
    def dtype(self) -> torch.dtype:
        """Number format of the layers; that of the live weights, unless they are sharded."""
        return self.computes_in or next(self.network.parameters()).dtype

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """Return the names and parameters that training changes."""
        return [(name, p) for name, p in self.network.named_parameters() if p.requires_grad]

    @contextmanager
    def without_adapter(self) -> Iterator[None]:
        """Switch the adapter off within the context."""
        assert self.peft is not None, "the model has no adapter to switch off"
        self.adapter_off = True
        try:
            with self.peft.disable_adapter():
                yield
        finally:
            self.adapter_off = False

    def computing(self) -> AbstractContextManager[None]:
        """Return a context for `outputs` and `scores`; keep it open until backward has finished."""
        return self.engine.computing(self)

    def outputs(self, records: Sequence[Record], *, statistics: bool = False, top_logits: int = 0) -> Outputs:
        """Compute log-probabilities of the completions' tokens; see `Engine.outputs`."""
        return self.engine.outputs(self, records, statistics=statistics, top_logits=top_logits)

    def scores(self, records: Sequence[Record]) -> Outputs:
        """Compute a scalar head's output for each completion; see `Engine.scores`."""
        return self.engine.scores(self, records)

    def values(self, records: Sequence[Record]) -> Outputs:
        """Compute a value head's output before each token; see `Engine.values`."""
        return self.engine.values(self, records)

    def batches(self, records: Sequence[Record], budget: int) -> list[list[int]]:
        """Return indices of records to compute together; see `Engine.batches`."""
        return self.engine.batches(self, records, budget)

    def passes(self) -> Passes:
        """Return what computes the passes over gradients and weights of an update."""
        return self.engine.passes(self)

    def save(self, directory: Path) -> None:
        """Write model (or adapter) and tokenizer in Hugging Face layout, as safetensors.

        The generation config names every token that ends Palate's own sampling, so that other programs stop
        at the same places.
        """
        for key in self._dropout:
            setattr(self.network.config, key, self._dropout[key])
        end_ids = [self.codec.end_id, *sorted(self.codec.end_ids - {self.codec.end_id})]
        generation = self.network.generation_config if self.head == "lm" else None
        if generation is not None:
            generation.eos_token_id = end_ids if len(end_ids) > 1 else end_ids[0]
            generation._from_model_config = False  # else transformers may replace it by the model's config
        try:
            if self.peft is not None:
                self.peft.save_pretrained(directory, save_embedding_layers=self.whole_embeddings)
                if generation is not None:
                    generation.save_pretrained(directory)
            else:
                self.network.save_pretrained(directory)
        finally:
            for key in self._dropout:
                setattr(self.network.config, key, 0.0)
        self.codec.save(directory)
