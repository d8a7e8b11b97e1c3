"""Sampling: who draws which numbers, and which engine does the work."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence

import torch

from palate.config import Sampling
from palate.model.decode import Decoder
from palate.model.fast import head_of
from palate.model.generate import generated
from palate.model.load import LoadedModel
from palate.model.rows import Row
from palate.model.sampling import row_uniforms
from palate.types import Group, Prompt

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
) -> list[Group]:
    """n completions of each prompt, by the fast engine where the model has one.

    Prompts of like length are sampled together, `sampling.sampling_rows` completions at a time.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`.
    """
    for prompt in prompts:
        model.codec.room(prompt, need=sampling.max_new_tokens)
    occurrence: Counter[str] = Counter()
    rows: list[list[Row]] = []
    for prompt in prompts:
        ids, seen = model.codec.prompt_ids(prompt), occurrence[prompt.id]
        new = sampling.max_new_tokens
        rows.append([Row(ids, row_uniforms(seed, prompt.id, seen, j, new)) for j in range(n)])
        occurrence[prompt.id] += 1
    by_length = sorted(rows, key=lambda group: len(group[0].prompt_ids))
    engine = generated if model.fast is None else decoded
    for tokens in engine(model, by_length, sampling):
        observe("sample", tokens)
    return [
        Group(prompt, tuple(row.completion(model.codec, sampling, version) for row in group))
        for prompt, group in zip(prompts, rows, strict=True)
    ]


@torch.no_grad()
def decoded(model: LoadedModel, groups: Sequence[list[Row]], sampling: Sampling) -> Iterator[int]:
    """Fill groups of rows of one prompt each with tokens; gives how many have come, step by step."""
    if not groups:
        return
    network, n = model.sampling_network(), len(groups[0])
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
