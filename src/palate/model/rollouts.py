"""Sampling in chunks, which are reproducible and stored in a memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np

from palate.config import Sampling
from palate.errors import RunError
from palate.memory import Memory, Purpose, key_of
from palate.model.codec import Codec
from palate.model.loaded import Fill, LoadedModel, Weights
from palate.model.rows import Row
from palate.model.sampling import row_uniforms
from palate.model.sharded import ShardedEngine
from palate.types import Completion, Group, Prompt
from palate.world import current, own_part, shared_rows

CHUNK = 4
"""Size of a chunk as a multiple of the completions sampled in parallel. It is small, since an interrupted run
loses its last chunk; it is more than one, since finished rows are refilled only from their own chunk."""
SERVED_CHUNK = 1
"""The same if a sampler works: it fills its rows from two chunks at once, and a failure loses both."""

FEW_ROWS, MOST_ROWS = 64, 256
"""Default numbers of completions sampled in parallel: of a few per prompt, and at most of many."""
MANY = 16
"""Number of completions per prompt from which more rows are sampled in parallel: a pool of candidates."""
SERVED_ROWS = 256
"""Default number of completions that a sampler is asked for at once."""
MOST_BYTES = 2 << 30
"""Largest size of the keys and values for which the default is more than `FEW_ROWS`."""

Observer = Callable[[str, int], None]
"""Receives the kind and the amount of finished work, such as `("sample", tokens)`."""


def unobserved(stage: str, amount: int) -> None:
    """Ignore reports of work."""


class Drawn(Protocol):
    """A batch of completions that is being sampled."""

    def ready(self) -> bool:
        """Return whether `groups` returns at once."""

    def groups(self) -> list[Group]:
        """Wait for the completions, keep them in the memory, and return them in the order of the prompts."""


def begin(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    *,
    seed: int,
    version: int,
    observe: Observer = unobserved,
    memory: Memory | None = None,
    name: str = "policy",
    purpose: Purpose = "completion",
    finished: Callable[[Group], None] | None = None,
    known_only: bool = False,
) -> Drawn:
    """Begin to sample n completions of each prompt: with the model's engine, or with its sampler.

    Prompts of similar length form a chunk, which is sampled together, `sampling.sampling_rows` completions at
    a time. A memory stores whole chunks. The composition of a chunk depends only on the arguments, so
    sampling it again with the engine gives the same completions. Several processes sample each a part of its
    prompts. The engine samples at once; a sampler works in the background, and the model may change
    meanwhile.

    Args:
        model: the model to sample from.
        prompts, n, sampling: the prompts, the number of completions of each, and the options.
        seed: seed of the draws; each (seed, prompt, index) has its own numbers.
        version, name: version and name of the policy, which are part of the memory's keys; completions carry
            the version.
        observe: receives the number of new tokens.
        memory: returns known chunks, and stores new chunks.
        purpose: the use of the texts; stored with them.
        finished: receives each group as soon as its completions are finished, unless they were known; from a
            thread if a sampler samples.
        known_only: return stored completions only, since the model has other weights than this version.

    Raises:
        DataError: a prompt is too long to leave room for `max_new_tokens`.
        RunError: `known_only`, and the memory lacks a chunk.
    """
    for prompt in prompts:
        model.codec.room(prompt, need=sampling.max_new_tokens)
    occurrence: Counter[str] = Counter()
    requests: list[_Request] = []
    for prompt in prompts:
        requests.append(_Request(prompt, tuple(model.codec.prompt_ids(prompt)), occurrence[prompt.id]))
        occurrence[prompt.id] += 1
    by_length = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
    longest = max((len(request.ids) for request in requests), default=0)
    default = (
        parallel_rows(model.network.config, n, longest + sampling.max_new_tokens)
        if model.sampler is None
        else SERVED_ROWS
    )
    rows = sampling.sampling_rows or default
    of_chunk = rows if model.chunk_rows is None else model.chunk_rows or default
    sampling = sampling.model_copy(update={"sampling_rows": rows})
    size = max(1, (CHUNK if model.sampler is None else SERVED_CHUNK) * of_chunk // n)
    options = sampling.model_dump(exclude={"sampling_rows"})
    engine = () if model.sampler is None else (model.sampler.identity,)
    chunks: list[_Chunk] = []
    weights: Weights | None = None
    for start in range(0, len(requests), size):
        places = by_length[start : start + size]
        own = [requests[i] for i in places]
        inputs = [(r.prompt.id, r.ids, r.seen) for r in own]
        key = key_of("sample", purpose, name, version, seed, n, options, inputs, *engine)
        chunk = _Chunk(key, places, own, None if memory is None else memory.completions(key))
        chunks.append(chunk)
        if chunk.completions is not None:
            continue
        if known_only:
            raise RunError(
                f"the samples of version {version} of the {name} are missing in the journal, and that "
                "version is gone; start over with --overwrite"
            )
        draw = partial(_sampled, model.codec, own_part(own), n, sampling, seed, version, finished)
        if model.sampler is None:
            _prepare(model)
            chunk.completions = _joined(own, draw(observe, partial(model.engine.fill, model)))
            _keep(chunk, memory, version, purpose)
        else:
            weights = weights or model.sampler.publish(model)
            chunk.future = weights.begin(partial(draw, unobserved))
    return _Batch(requests, chunks, observe, partial(_keep, memory=memory, version=version, purpose=purpose))


def sample(
    model: LoadedModel, prompts: Sequence[Prompt], n: int, sampling: Sampling, **options: Any
) -> list[Group]:
    """Sample n completions of each prompt, and wait for them; see `begin` for the arguments and errors."""
    return begin(model, prompts, n, sampling, **options).groups()


def parallel_rows(config: Any, n: int, tokens: int) -> int:
    """Return the default number of completions sampled in parallel.

    It depends on the arguments alone, not on free memory, so a resumed run samples in the same chunks.

    Args:
        config: the network's configuration.
        n: number of completions of each prompt.
        tokens: most tokens of a row, prompt included.
    """
    if n < MANY:
        return FEW_ROWS
    text = config.get_text_config()
    all_heads: int = getattr(text, "num_attention_heads", None) or 1  # some architectures have none
    heads: int = getattr(text, "num_key_value_heads", None) or all_heads
    size: int = getattr(text, "head_dim", None) or text.hidden_size // all_heads
    row: int = 2 * 4 * text.num_hidden_layers * heads * size * tokens  # keys and values in float32
    return max(FEW_ROWS, min(MOST_ROWS, MOST_BYTES // row) // FEW_ROWS * FEW_ROWS)


@dataclass(frozen=True)
class _Request:
    """A prompt, its tokens, and the number of its earlier occurrences in the same call."""

    prompt: Prompt
    ids: tuple[int, ...]
    seen: int


def packed(completion: Completion) -> list[Any]:
    """Return a completion as values that travel between processes; `unpacked` reverses it."""
    c = completion
    logps, sampling = (None if p is None else np.asarray(p, np.float32) for p in (c.logps, c.sampling_logps))
    return [c.text, c.finish, c.policy_version, np.asarray(c.token_ids, np.int32), logps, sampling]


def unpacked(values: Sequence[Any]) -> Completion:
    """Return the completion of `packed`."""
    text, finish, version, ids, *logps = values
    first, second = (None if p is None else tuple(p.tolist()) for p in logps)
    return Completion(text, tuple(ids.tolist()), finish, version, first, second)


@dataclass
class _Chunk:
    """Requests that are sampled together and stored together.

    Attributes:
        key: their key in the memory.
        places: the index of each in the call.
        requests: the requests.
        completions: the completions of each, once they are known.
        future: this process's part of them, while a sampler works.
    """

    key: str
    places: Sequence[int]
    requests: Sequence[_Request]
    completions: list[tuple[Completion, ...]] | None
    future: Future[list[tuple[Completion, ...]]] | None = None


@dataclass(frozen=True)
class _Batch:
    """Chunks that are being sampled; see `Drawn`."""

    requests: Sequence[_Request]
    chunks: Sequence[_Chunk]
    observe: Observer
    keep: Callable[[_Chunk], None]

    def ready(self) -> bool:
        return all(chunk.future is None or chunk.future.done() for chunk in self.chunks)

    def groups(self) -> list[Group]:
        by_index: dict[int, tuple[Completion, ...]] = {}
        for chunk in self.chunks:
            if chunk.completions is None:
                assert chunk.future is not None, "a chunk is known or being sampled"
                waited = not chunk.future.done()
                own = chunk.future.result()
                chunk.completions = _joined(chunk.requests, own)
                # Work beside other work has no time of its own, so its rate is not measured.
                self.observe("sample", sum(len(c.token_ids) for group in own for c in group) if waited else 0)
                self.keep(chunk)
            by_index |= dict(zip(chunk.places, chunk.completions, strict=True))
        return [Group(request.prompt, by_index[i]) for i, request in enumerate(self.requests)]


def _keep(chunk: _Chunk, memory: Memory | None, version: int, purpose: Purpose) -> None:
    if memory is not None and chunk.completions is not None:
        prompts = [request.prompt for request in chunk.requests]
        memory.keep_completions(chunk.key, version, prompts, chunk.completions, purpose=purpose)


def _prepare(model: LoadedModel) -> None:
    if isinstance(model.engine, ShardedEngine):
        model.engine.prepare(model)


def _joined(
    requests: Sequence[_Request], own: Sequence[tuple[Completion, ...]]
) -> list[tuple[Completion, ...]]:
    """Return the completions of all processes' requests, given those of this process's own."""
    if current().size == 1:
        return list(own)
    groups = shared_rows("sample", requests, lambda part: [[packed(c) for c in group] for group in own])
    return [tuple(unpacked(c) for c in group) for group in groups]


def _sampled(
    codec: Codec,
    requests: Sequence[_Request],
    n: int,
    sampling: Sampling,
    seed: int,
    version: int,
    finished: Callable[[Group], None] | None,
    observe: Observer,
    fill: Fill,
) -> list[tuple[Completion, ...]]:
    new = sampling.max_new_tokens
    rows = [[Row(r.ids, row_uniforms(seed, r.prompt.id, r.seen, j, new)) for j in range(n)] for r in requests]

    def completed(i: int) -> tuple[Completion, ...]:
        return tuple(row.completion(codec, sampling, version) for row in rows[i])

    waiting = set(range(len(rows))) if finished is not None else set()
    for tokens in fill(rows, sampling):
        observe("sample", tokens)
        # A row that ends with a stop text looks unfinished here; its group follows at the end.
        for i in [i for i in waiting if all(_has_ended(row, codec, new) for row in rows[i])]:
            waiting.discard(i)
            assert finished is not None
            finished(Group(requests[i].prompt, completed(i)))
    for i in sorted(waiting):
        assert finished is not None
        finished(Group(requests[i].prompt, completed(i)))
    return [completed(i) for i in range(len(rows))]


def _has_ended(row: Row, codec: Codec, new: int) -> bool:
    return len(row.tokens) >= new or (bool(row.tokens) and row.tokens[-1] in codec.end_ids)
