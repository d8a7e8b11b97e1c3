"""Sampling with transformers' `generate` and Palate's own draw, for the plain engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from palate.model.loaded import LoadedModel
from palate.model.rows import Row, cut
from palate.model.sampling import Barred, choose


@torch.no_grad()
def generated(model: LoadedModel, groups: Sequence[Sequence[Row]], sampling: Sampling) -> Iterator[int]:
    """Fill rows with tokens, `sampling.sampling_rows` at a time; yield the number of new tokens."""
    rows = [row for group in groups for row in group]
    most = sampling.sampling_rows or len(rows)
    for start in range(0, len(rows), most):
        chunk = rows[start : start + most]
        yield _generate(model, chunk, sampling)


def _generate(model: LoadedModel, rows: list[Row], sampling: Sampling) -> int:
    """Sample rows with one call of `generate`; padding is on the left of prompts and masked."""
    codec = model.codec
    width = max(len(row.prompt_ids) for row in rows)
    pad = [width - len(row.prompt_ids) for row in rows]
    input_ids = torch.tensor(
        [[codec.end_id] * p + list(r.prompt_ids) for p, r in zip(pad, rows, strict=True)]
    )
    attention_mask = (torch.arange(width)[None] >= torch.tensor(pad)[:, None]).long()
    chooser = _Draw(model, rows, sampling)
    stopping = StoppingCriteriaList([_StopTexts(codec, width, sampling.stop)] if sampling.stop else [])
    # The empty config removes the model's own defaults (top-k, a repetition penalty), which would apply to
    # all options that are not set below.
    own, model.network.generation_config = model.network.generation_config, GenerationConfig()
    try:
        out = model.network.generate(
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            generation_config=GenerationConfig(
                do_sample=False,  # `_Draw` draws the token and leaves no other
                max_new_tokens=sampling.max_new_tokens,
                eos_token_id=sorted(codec.end_ids),
                pad_token_id=codec.end_id,
                use_cache=True,
            ),
            logits_processor=LogitsProcessorList([chooser]),
            stopping_criteria=stopping,
        )
    finally:
        model.network.generation_config = own
    total = 0
    for row, taken in zip(rows, out[:, width:].tolist(), strict=True):
        size, _, _ = cut(codec, row.tokens, sampling.stop)
        total += size
        if taken[:size] != row.tokens[:size]:
            raise ModelError(
                f"{model.source}: generate changed the drawn tokens, so this model cannot be sampled"
            )
    return total


class _Draw(LogitsProcessor):  # type: ignore[misc]
    """Draws a token for each row, adds it to the row, and leaves `generate` no other choice.

    Finished rows continue to draw until all rows are finished; these tokens are removed later.
    """

    def __init__(self, model: LoadedModel, rows: list[Row], sampling: Sampling) -> None:
        self.rows = rows
        self.uniforms = torch.from_numpy(np.stack([row.uniforms for row in rows])).to(model.device)
        self.sampling = sampling
        self.end_ids = torch.tensor(sorted(model.codec.end_ids), device=model.device)
        self.seen: Tensor | None = None
        self.step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.float()
        if self.seen is None and self.sampling.repetition_penalty != 1.0:
            # Use the prompts' own tokens, not `input_ids`: the padding there would count as seen, and if it
            # is the end token, the penalty would prevent padded rows from ending.
            self.seen = torch.zeros_like(scores, dtype=torch.bool)
            for seen, row in zip(self.seen, self.rows, strict=True):
                seen[list(row.prompt_ids)] = True
        barred = None
        if self.step < self.sampling.min_new_tokens:
            barred = Barred(torch.ones(len(scores), dtype=torch.bool, device=scores.device), self.end_ids)
        uniforms = self.uniforms[:, self.step]
        tokens, logps, restricted = choose(scores, self.sampling, uniforms, seen=self.seen, barred=barred)
        self.step += 1
        for row, *drawn in zip(self.rows, tokens.tolist(), logps.tolist(), restricted.tolist(), strict=True):
            row.add(*drawn)
        if self.seen is not None:
            self.seen.scatter_(-1, tokens[:, None], True)
        return torch.full_like(scores, -torch.inf).scatter(-1, tokens[:, None], 0.0)


class _StopTexts(StoppingCriteria):  # type: ignore[misc]
    """Ends a row whose completion contains a stop text."""

    def __init__(self, codec: Codec, prompt_width: int, stop: Sequence[str]) -> None:
        self.codec, self.prompt_width, self.stop = codec, prompt_width, stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        texts = [self.codec.text(row) for row in input_ids[:, self.prompt_width :].tolist()]
        return torch.tensor([any(s in text for s in self.stop) for text in texts], device=input_ids.device)
