"""Sampling in chunks, which are drawn with numbers of their own and kept in a memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from palate.config import Sampling
from palate.memory import Memory, Purpose, key_of
from palate.model.loaded import LoadedModel, SamplingEngine
from palate.model.rows import Row
from palate.model.sampling import row_uniforms
from palate.types import Completion, Group, Prompt

CHUNK = 4
"""A chunk has this many times the completions that are sampled side by side. It is small, since an
interrupted run loses its last chunk; it is more than one, since ended rows are refilled only from their own
chunk."""

Observer = Callable[[str, int], None]
"""Takes the kind and the amount of work that has just been done: `("sample", tokens)`."""


def unobserved(stage: str, amount: int) -> None:
    """Ignore the work that is reported."""


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
) -> list[Group]:
    """Sample n completions of each prompt with the model's engine.

    Prompts of similar length make a chunk, which is sampled together, `sampling.sampling_rows` completions at
    a time. A memory keeps whole chunks. The composition of a chunk depends on the arguments alone, so the
    same completions come again when it is sampled again.

    Args:
        model: the model to sample from.
        prompts, n, sampling: the prompts, completions of each, and options.
        seed: of the draws; each (seed, prompt, index) has its own.
        version, name: of the policy; they are part of the memory's keys, and completions carry the version.
        observe: takes the number of tokens as they come.
        memory: gives chunks that are known already, and keeps new ones.
        purpose: the use of the texts; kept with them.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`.
    """
    for prompt in prompts:
        model.codec.room(prompt, need=sampling.max_new_tokens)
    occurrence: Counter[str] = Counter()
    asked: list[_Asked] = []
    for prompt in prompts:
        asked.append(_Asked(prompt, tuple(model.codec.prompt_ids(prompt)), occurrence[prompt.id]))
        occurrence[prompt.id] += 1
    by_length = sorted(range(len(asked)), key=lambda i: len(asked[i].ids))
    size = max(1, CHUNK * sampling.sampling_rows // n)
    options = sampling.model_dump(exclude={"sampling_rows"})
    by_index: dict[int, tuple[Completion, ...]] = {}
    for start in range(0, len(asked), size):
        chunk = by_length[start : start + size]
        own = [asked[i] for i in chunk]
        inputs = [(a.prompt.id, a.ids, a.seen) for a in own]
        key = key_of("sample", purpose, name, version, seed, n, options, inputs)
        completions = None if memory is None else memory.completions(key)
        if completions is None:
            completions = _sampled(model.engine, model, own, n, sampling, seed, version, observe)
            if memory is not None:
                memory.keep_completions(key, version, [a.prompt for a in own], completions, purpose=purpose)
        by_index |= dict(zip(chunk, completions, strict=True))
    return [Group(prompt, by_index[i]) for i, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class _Asked:
    """A prompt, its tokens, and the number of its earlier occurrences in the same call."""

    prompt: Prompt
    ids: tuple[int, ...]
    seen: int


def _sampled(
    engine: SamplingEngine,
    model: LoadedModel,
    asked: Sequence[_Asked],
    n: int,
    sampling: Sampling,
    seed: int,
    version: int,
    observe: Observer,
) -> list[tuple[Completion, ...]]:
    new = sampling.max_new_tokens
    rows = [[Row(a.ids, row_uniforms(seed, a.prompt.id, a.seen, j, new)) for j in range(n)] for a in asked]
    for tokens in engine.fill(model, rows, sampling):
        observe("sample", tokens)
    return [tuple(row.completion(model.codec, sampling, version) for row in group) for group in rows]
