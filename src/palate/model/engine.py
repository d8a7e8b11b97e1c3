"""Sampling by transformers' `generate`, with Palate's own draw: the plain engine, right on every model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from palate.config import Sampling
from palate.errors import ModelError
from palate.model.codec import Codec
from palate.model.load import LoadedModel
from palate.model.sampling import draw, restricted_logps, row_uniforms
from palate.types import Completion, Finish, Group, Prompt

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
    """n completions of each prompt.

    Rows of like prompt length are sampled together, `sampling.sampling_rows` at a time.

    Raises:
        DataError: a prompt leaves no room for `max_new_tokens`.
    """
    for prompt in prompts:
        model.codec.room(prompt, need=sampling.max_new_tokens)
    occurrence: Counter[str] = Counter()
    rows: list[tuple[int, int, int]] = []  # (prompt index, occurrence of the prompt, sample index)
    for i, prompt in enumerate(prompts):
        rows += [(i, occurrence[prompt.id], j) for j in range(n)]
        occurrence[prompt.id] += 1
    rows.sort(key=lambda row: len(model.codec.prompt_ids(prompts[row[0]])))
    found: dict[tuple[int, int], Completion] = {}
    for start in range(0, len(rows), sampling.sampling_rows):
        chunk = rows[start : start + sampling.sampling_rows]
        uniforms = np.stack(
            [row_uniforms(seed, prompts[i].id, seen, j, sampling.max_new_tokens) for i, seen, j in chunk]
        )
        completions = _sample_rows(model, [prompts[i] for i, _, _ in chunk], uniforms, sampling, version)
        found |= {(i, j): completion for (i, _, j), completion in zip(chunk, completions, strict=True)}
        observe("sample", sum(len(c.token_ids) for c in completions))
    return [Group(prompt, tuple(found[i, j] for j in range(n))) for i, prompt in enumerate(prompts)]


@torch.no_grad()
def _sample_rows(
    model: LoadedModel, prompts: Sequence[Prompt], uniforms: np.ndarray, sampling: Sampling, version: int
) -> list[Completion]:
    """One completion for each prompt; prompts are padded on the left, where the mask hides it."""
    ids = [model.codec.prompt_ids(prompt) for prompt in prompts]
    width = max(map(len, ids))
    pad = [width - len(row) for row in ids]
    input_ids = torch.tensor([[model.codec.end_id] * p + list(row) for p, row in zip(pad, ids, strict=True)])
    attention_mask = (torch.arange(width)[None] >= torch.tensor(pad)[:, None]).long()
    chooser = _Draw(model, ids, torch.from_numpy(uniforms), sampling)
    stopping = StoppingCriteriaList()
    if sampling.stop:
        stopping.append(_StopTexts(model.codec, width, sampling.stop))
    out = model.network.generate(
        input_ids=input_ids.to(model.device),
        attention_mask=attention_mask.to(model.device),
        generation_config=GenerationConfig(
            do_sample=False,  # `_Draw` has drawn already and leaves one token to take
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=sorted(model.codec.end_ids),
            pad_token_id=model.codec.end_id,
            use_cache=True,
        ),
        logits_processor=LogitsProcessorList([chooser]),
        stopping_criteria=stopping,
    )
    drawn = chooser.rows()
    completions = [
        _completion(model.codec, row, logps, restricted, sampling, version)
        for row, logps, restricted in zip(drawn, _rows(chooser.logps), _rows(chooser.restricted), strict=True)
    ]
    for taken, completion in zip(out[:, width:].tolist(), completions, strict=True):
        if tuple(taken[: len(completion.token_ids)]) != completion.token_ids:
            raise ModelError(
                f"{model.source}: generate changed the tokens drawn, so this model cannot be sampled"
            )
    return completions


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws a token for each row, notes its log-probabilities, and leaves `generate` nothing else to take."""

    def __init__(
        self, model: LoadedModel, prompt_ids: Sequence[Sequence[int]], uniforms: Tensor, sampling: Sampling
    ) -> None:
        self.uniforms = uniforms.to(model.device)
        self.sampling = sampling
        self.end_ids = torch.tensor(sorted(model.codec.end_ids), device=model.device)
        self.prompt_ids = prompt_ids
        self.seen: Tensor | None = None
        self.tokens: list[Tensor] = []
        self.logps: list[Tensor] = []
        self.restricted: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.sampling.repetition_penalty != 1.0:
            self._note_seen(scores)
        barred = None
        if len(self.tokens) < self.sampling.min_new_tokens:
            barred = torch.zeros_like(scores, dtype=torch.bool).index_fill(-1, self.end_ids, True)
        restricted = restricted_logps(scores, self.sampling, seen=self.seen, barred=barred)
        token = draw(restricted, self.uniforms[:, len(self.tokens)])[:, None]
        self.tokens.append(token)
        self.logps.append(scores.gather(-1, token) - scores.logsumexp(-1, keepdim=True))
        self.restricted.append(restricted.gather(-1, token))
        return torch.full_like(scores, -torch.inf).scatter(-1, token, 0.0)

    def rows(self) -> list[list[int]]:
        """Tokens drawn for each row, those after its end included."""
        return torch.cat(self.tokens, dim=-1).tolist()

    def _note_seen(self, scores: Tensor) -> None:
        # From the prompt's own tokens, not from `input_ids`: there the padding would count as seen, and
        # where padding is the end token a padded row would be penalised for ending.
        if self.seen is None:
            self.seen = torch.zeros_like(scores, dtype=torch.bool)
            for row, ids in zip(self.seen, self.prompt_ids, strict=True):
                row[list(ids)] = True
        else:
            self.seen.scatter_(-1, self.tokens[-1], True)


class _StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends a row whose completion has come to one of the stop texts."""

    def __init__(self, codec: Codec, prompt_width: int, stop: Sequence[str]) -> None:
        self.codec, self.prompt_width, self.stop = codec, prompt_width, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = [self.codec.text(row) for row in input_ids[:, self.prompt_width :].tolist()]
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=input_ids.device)


def _completion(
    codec: Codec,
    drawn: list[int],
    logps: list[float],
    restricted: list[float],
    sampling: Sampling,
    version: int,
) -> Completion:
    """Cut what was drawn at the first end token, or where the first stop text is complete."""
    size = next((k + 1 for k, token in enumerate(drawn) if token in codec.end_ids), len(drawn))
    finish: Finish = "eos" if drawn[size - 1] in codec.end_ids else "length"
    text = codec.text(drawn[:size])
    if any(stop in text for stop in sampling.stop):
        finish = "stop"
        size = next(k for k in range(1, size + 1) if any(s in codec.text(drawn[:k]) for s in sampling.stop))
        text = text[: min(i for i in (text.find(s) for s in sampling.stop) if i >= 0)]
    return Completion(
        text, tuple(drawn[:size]), finish, version, tuple(logps[:size]), tuple(restricted[:size])
    )


def _rows(values: list[Tensor]) -> list[list[float]]:
    return torch.cat(values, dim=-1).tolist()
