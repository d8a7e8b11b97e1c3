"""Sampling: who draws which numbers, and which engine does the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from palate.config import Sampling
from palate.journal import Journal, key_of
from palate.model.fast.decode import Decoder
from palate.model.fast.probe import head_of
from palate.model.load import LoadedModel
from palate.model.plain.generate import generated
from palate.model.rows import Row
from palate.model.sampling import row_uniforms
from palate.types import Completion, Group, Prompt

CHUNK = 4
"""A chunk has so many times the completions that are sampled side by side: few, since a run that is cut
off loses its last one; more than one, since places are only refilled from within it."""

Observer = Callable[[str, int], None]
"""Told what has just been done, and how much of it: `("sample", tokens)`."""


def unobserved(stage: str, amount: int) -> None:
    """An observer that does not care."""


def sample(
    model: LoadedModel,
    prompts: Sequence[Prompt],
    n: int,
    sampling: Sampling,
    *,
    seed: int,
    version: int,
    observe: Observer = unobserved,
    journal: Journal | None = None,
    name: str = "policy",
) -> list[Group]:
    """n completions of each prompt, by the fast engine where the model has one.

    Prompts of like length make a chunk, which is sampled together, `sampling.sampling_rows` completions at a
    time. A chunk is what a journal keeps: its composition follows from the arguments alone, so one that is
    sampled again comes out the same.

    Args:
        model, prompts, n, sampling: what to sample from, and how.
        seed: of the draws; each (seed, prompt, index) has its own.
        version, name: of the policy, noted in the completions and part of the journal's keys.
        observe: told of tokens as they come.
        journal: where chunks are looked for and kept.

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
    found: dict[int, tuple[Completion, ...]] = {}
    for start in range(0, len(asked), size):
        chunk = by_length[start : start + size]
        own = [asked[i] for i in chunk]
        key = key_of("sample", name, version, seed, n, options, [(a.prompt.id, a.ids, a.seen) for a in own])
        completions = None if journal is None else journal.completions(key)
        if completions is None:
            completions = _sampled(model, own, n, sampling, seed, version, observe)
            if journal is not None:
                journal.keep_completions(key, version, [a.prompt for a in own], completions)
        found |= dict(zip(chunk, completions, strict=True))
    return [Group(prompt, found[i]) for i, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class _Asked:
    """A prompt, its tokens, and how many times it came before in the same call."""

    prompt: Prompt
    ids: tuple[int, ...]
    seen: int


def _sampled(
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
    engine = generated if model.fast is None else decoded
    for tokens in engine(model, rows, sampling):
        observe("sample", tokens)
    return [tuple(row.completion(model.codec, sampling, version) for row in group) for group in rows]


@torch.no_grad()
def decoded(model: LoadedModel, groups: Sequence[list[Row]], sampling: Sampling) -> Iterator[int]:
    """Fill groups of rows of one prompt each with tokens; gives how many have come, step by step."""
    if not groups:
        return
    network, most = model.sampling_network(), sampling.sampling_rows
    groups = [group[i : i + most] for group in groups for i in range(0, len(group), most)]
    n = len(groups[0])
    decoder = Decoder(
        network,
        head_of(network),
        model.codec,
        sampling,
        slots=min(len(groups), max(1, sampling.sampling_rows // n)),
        rows=n,
        longest=max(len(group[0].prompt_ids) for group in groups),
    )
    yield from decoder.run(iter(groups))
