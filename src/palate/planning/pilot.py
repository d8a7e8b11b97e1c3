"""A pilot of a few completions, and the rates of sampling and training on this machine."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from palate.annotate import Annotator
from palate.config import Sampling
from palate.learn import Learner, Likelihood, Policy, Ranking
from palate.method import Method
from palate.planning.speed import Rates
from palate.types import Example, Group, Prompt

T = TypeVar("T")

WARM = 4
"""Tokens of the shorter of two calls of sampling, whose difference gives the time of a step."""

SECONDS = 2.5
"""Time for the longer call, about a quarter of ten seconds."""

FEWEST, MOST = 4, 24
"""The fewest and the most steps of the longer call besides those of the shorter."""


@dataclass(frozen=True)
class Pilot:
    """A few completions of the model, and rates.

    Attributes:
        groups: the completions; empty if the method's learner generates no text.
        rates: seconds on this machine.
        saved: bytes per token that a forward pass keeps for the backward pass.
    """

    groups: tuple[Group, ...]
    rates: Rates
    saved: float

    @property
    def lengths(self) -> list[int]:
        """The tokens of each completion."""
        return [len(c.token_ids) for group in self.groups for c in group.completions]


def pilot(
    method: Method,
    cfg: Any,
    prompts: Sequence[Prompt],
    records: Sequence[Any],
    count: int,
    *,
    rows: int,
    annotate: Annotator | None = None,
) -> Pilot:
    """Load the model, sample, and time about ten seconds of work; the weights are thrown away.

    Args:
        method, cfg: the method and its configuration.
        prompts: prompts that leave room for a completion, the same as in the run.
        records: pairs or examples of the data; empty if the method learns from samples.
        count: completions to sample.
        rows: completions that the run samples in parallel.
        annotate: scores the completions, if that costs nothing.
    """
    load = Policy.load if method.learner is None else method.learner
    learner, loading = timed(lambda: load(cfg, total_steps=1, seed=0))
    groups: list[Group] = []
    seconds = 0.0
    few: list[Prompt] = []
    if isinstance(learner, Policy) and isinstance(cfg, Sampling) and prompts:
        policy, sampling = learner, cfg.sampling
        few = _spread(prompts, count)
        n = math.ceil(count / len(few))
        groups, seconds = timed(lambda: policy.snapshot().sample(few, n, sampling, seed=0))
    learnt = list(records) or [Example(g.prompt, c) for g in groups for c in g.completions]
    update, apply, forward, saved = _learning(learner, learnt)
    call = step = row = 0.0
    if few:
        call, step, row = _decoding(learner, few, cfg.sampling, rows, groups, seconds, forward)
    score = 0.0
    if annotate is not None and groups:
        annotate(groups[:1])
        _, spent = timed(lambda: annotate(groups))
        score = spent / sum(len(group.completions) for group in groups)
    rates = Rates(loading, call, step, row, forward, forward, update, apply, score)
    return Pilot(tuple(groups), rates, saved)


def timed(work: Callable[[], T]) -> tuple[T, float]:
    """Return the result of some work, and its seconds."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    result = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - began


def _spread(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return up to `count` prompts from all parts of the data."""
    distinct = list({prompt.id: prompt for prompt in prompts}.values())
    few = min(count, len(distinct))
    return [distinct[i * len(distinct) // few] for i in range(few)]


def _decoding(
    learner: Learner,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    rows: int,
    groups: Sequence[Group],
    seconds: float,
    per_prompt_token: float,
) -> tuple[float, float, float]:
    """Return the seconds of a call, of a step, and of a row of a step.

    The pilot has few rows; two further calls have as many as the run, and different lengths.
    """
    assert isinstance(learner, Policy)
    lengths = [len(c.token_ids) for group in groups for c in group.completions]
    n = math.ceil(rows / len(prompts))

    def call(tokens: int) -> float:
        options = {"max_new_tokens": tokens, "min_new_tokens": tokens, "sampling_rows": max(rows, 1)}
        own = sampling.model_copy(update=options)
        learner.model.revision += 1  # as after an update
        some = list(prompts)[: math.ceil(rows / n)]
        return timed(lambda: learner.snapshot().sample(some, n, own, seed=1))[1]

    call(1)
    short = call(WARM)
    guess = max(seconds / max(lengths), 1e-4)
    more = min(MOST, max(FEWEST, int(SECONDS / guess)), max(1, sampling.max_new_tokens))
    wide = max((call(WARM + more) - short) / more, 1e-6)
    drawn = math.ceil(rows / n) * n
    read = sum(len(learner.model.codec.prompt_ids(p)) for p in list(prompts)[: math.ceil(rows / n)])
    fixed = max(0.0, short - WARM * wide - read * per_prompt_token)
    whole = sum(len(learner.model.codec.prompt_ids(g.prompt)) for g in groups) * per_prompt_token
    pilot_steps = max(seconds - whole - fixed, 1e-6)
    # wide = step + row * drawn;  pilot_steps = step * longest + row * tokens
    tokens, longest = sum(lengths), max(lengths)
    if drawn * longest - tokens > 0.2 * tokens:
        row = (wide * longest - pilot_steps) / (drawn * longest - tokens)
        row = min(max(row, 0.0), wide / drawn)
        return fixed, max(wide - row * drawn, 0.0), row
    row = 0.5 * wide / drawn  # too alike to tell the two apart
    return fixed, wide - row * drawn, row


def _learning(learner: Learner, records: Sequence[Any]) -> tuple[float, float, float, float]:
    """Return the seconds of a token with gradient, of an optimizer step, of a token without gradient, and
    the bytes that a token keeps.
    """
    if learner.model.head == "scalar":
        objective: Any = Ranking(0.0, 0.0)
        units: list[Any] = list(records)
    else:
        objective = Likelihood("sum")
        units = [one for record in records for one in _examples(record)]
    budget = learner.micro_batch_tokens
    few, half, many = (_batch(learner, units, budget // part) for part in (8, 3, 1))
    saved = _Saved(learner)
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
        learner.update(half, objective)
    learner.update(few, objective)
    (_, some), (_, more) = (timed(partial(learner.update, b, objective)) for b in (few, many))
    size, whole = _tokens(learner, few), _tokens(learner, many)
    each = max((more - some) / max(1, whole - size), 0.3 * more / whole)
    score = learner.scores if learner.model.head == "scalar" else learner.logps  # type: ignore[attr-defined]
    score(few)
    _, seconds = timed(lambda: score(many))
    return each, max(0.0, some - each * size), seconds / whole, saved.bytes / _tokens(learner, half)


def _examples(record: Any) -> list[Example]:
    if isinstance(record, Example):
        return [record]
    return [Example(record.prompt, completion) for completion in record.completions]


def _batch(learner: Learner, units: Sequence[Any], budget: int) -> list[Any]:
    """Return records of at most `budget` tokens in all, but at least one; records may repeat."""
    batch: list[Any] = []
    tokens = 0
    for unit in itertools.cycle(units):
        own = _tokens(learner, [unit])
        if batch and tokens + own > budget:
            return batch
        batch.append(unit)
        tokens += own
    return batch


def _tokens(learner: Learner, records: Sequence[Any]) -> int:
    codec = learner.model.codec
    return sum(
        len(codec.prompt_ids(record.prompt)) + sum(len(c.token_ids) for c in record.completions)
        for record in records
    )


class _Saved:
    """Counts the bytes of the tensors that autograd keeps, without weights."""

    def __init__(self, learner: Learner) -> None:
        self._weights = {p.untyped_storage().data_ptr() for p in learner.model.network.parameters()}
        self._seen: set[int] = set()
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Count a tensor whose memory has not been counted."""
        storage = tensor.untyped_storage()
        place = storage.data_ptr()
        if place not in self._weights and place not in self._seen:
            self._seen.add(place)
            self.bytes += storage.nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        """Return the tensor itself."""
        return tensor
