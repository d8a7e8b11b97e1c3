"""Sampling in chunks, which are reproducible and stored in a memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from palate.config import Sampling
from palate.errors import RunError
from palate.memory import Memory, Purpose, key_of
from palate.model.loaded import LoadedModel
from palate.model.rows import Row
from palate.model.sampling import row_uniforms
from palate.model.sharded import ShardedEngine
from palate.types import Completion, Group, Prompt
from palate.world import current, shared_rows

CHUNK = 4
"""Size of a chunk as a multiple of the completions sampled in parallel. It is small, since an interrupted run
loses its last chunk; it is more than one, since finished rows are refilled only from their own chunk."""

FEW_ROWS, MOST_ROWS = 64, 256
"""Default numbers of completions sampled in parallel: of a few per prompt, and at most of many."""
MANY = 16
"""Number of completions per prompt from which more rows are sampled in parallel: a pool of candidates."""
MOST_BYTES = 2 << 30
"""Largest size of the keys and values for which the default is more than `FEW_ROWS`."""

Observer = Callable[[str, int], None]
"""Receives the kind and the amount of finished work, such as `("sample", tokens)`."""


def unobserved(stage: str, amount: int) -> None:
    """Ignore reports of work."""


def sample(
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
) -> list[Group]:
    """Sample n completions of each prompt with the model's engine.

    Prompts of similar length form a chunk, which is sampled together, `sampling.sampling_rows` completions at
    a time. A memory stores whole chunks. The composition of a chunk depends only on the arguments, so
    sampling it again gives the same completions. Several processes sample each a part of its prompts.

    Args:
        model: the model to sample from.
        prompts, n, sampling: the prompts, the number of completions of each, and the options.
        seed: seed of the draws; each (seed, prompt, index) has its own numbers.
        version, name: version and name of the policy, which are part of the memory's keys; completions carry
            the version.
        observe: receives the number of new tokens.
        memory: returns known chunks, and stores new chunks.
        purpose: the use of the texts; stored with them.
        finished: receives each group as soon as its completions are finished, unless they were known.
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
    rows = sampling.sampling_rows or parallel_rows(model.network.config, n, longest + sampling.max_new_tokens)
    sampling = sampling.model_copy(update={"sampling_rows": rows})
    size = max(1, CHUNK * rows // n)
    options = sampling.model_dump(exclude={"sampling_rows"})
    by_index: dict[int, tuple[Completion, ...]] = {}
    for start in range(0, len(requests), size):
        chunk = by_length[start : start + size]
        own = [requests[i] for i in chunk]
        inputs = [(r.prompt.id, r.ids, r.seen) for r in own]
        key = key_of("sample", purpose, name, version, seed, n, options, inputs)
        completions = None if memory is None else memory.completions(key)
        if completions is None and known_only:
            raise RunError(
                f"the samples of version {version} of the {name} are missing in the journal, and that "
                "version is gone; start over with --overwrite"
            )
        if completions is None:
            completions = _shared(
                model, own, lambda part: _sampled(model, part, n, sampling, seed, version, observe, finished)
            )
            if memory is not None:
                memory.keep_completions(key, version, [r.prompt for r in own], completions, purpose=purpose)
        by_index |= dict(zip(chunk, completions, strict=True))
    return [Group(prompt, by_index[i]) for i, prompt in enumerate(prompts)]


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


def _shared(
    model: LoadedModel,
    requests: Sequence[_Request],
    sampled: Callable[[Sequence[_Request]], list[tuple[Completion, ...]]],
) -> list[tuple[Completion, ...]]:
    """Sample each process's own requests, and return the completions of all of them."""
    if isinstance(model.engine, ShardedEngine):
        model.engine.prepare(model)
    if current().size == 1:
        return sampled(requests)
    groups = shared_rows(
        "sample", requests, lambda own: [[packed(c) for c in group] for group in sampled(own)]
    )
    return [tuple(unpacked(c) for c in group) for group in groups]


def _sampled(
    model: LoadedModel,
    requests: Sequence[_Request],
    n: int,
    sampling: Sampling,
    seed: int,
    version: int,
    observe: Observer,
    finished: Callable[[Group], None] | None,
) -> list[tuple[Completion, ...]]:
    new = sampling.max_new_tokens
    rows = [[Row(r.ids, row_uniforms(seed, r.prompt.id, r.seen, j, new)) for j in range(n)] for r in requests]

    def completed(i: int) -> tuple[Completion, ...]:
        return tuple(row.completion(model.codec, sampling, version) for row in rows[i])

    waiting = set(range(len(rows))) if finished is not None else set()
    for tokens in model.engine.fill(model, rows, sampling):
        observe("sample", tokens)
        # A row that ends with a stop text looks unfinished here; its group follows at the end.
        for i in [i for i in waiting if all(_has_ended(row, model, new) for row in rows[i])]:
            waiting.discard(i)
            assert finished is not None
            finished(Group(requests[i].prompt, completed(i)))
    for i in sorted(waiting):
        assert finished is not None
        finished(Group(requests[i].prompt, completed(i)))
    return [completed(i) for i in range(len(rows))]


def _has_ended(row: Row, model: LoadedModel, new: int) -> bool:
    return len(row.tokens) >= new or (bool(row.tokens) and row.tokens[-1] in model.codec.end_ids)
