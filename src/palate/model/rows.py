"""Rows: completions during sampling, for all engines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from palate.config import Sampling
from palate.model.codec import Codec
from palate.types import Completion, Finish


@dataclass
class Row:
    """A completion during sampling.

    Attributes:
        prompt_ids: tokens of the prompt.
        uniforms: one random number in [0, 1) per token, float64 (max_new_tokens,).
        tokens: the tokens drawn so far.
        logps: their log-probabilities under the model.
        restricted: their log-probabilities under the sampling distribution.
    """

    prompt_ids: tuple[int, ...]
    uniforms: np.ndarray
    tokens: list[int] = field(default_factory=list)
    logps: list[float] = field(default_factory=list)
    restricted: list[float] = field(default_factory=list)

    def add(self, token: int, logp: float, restricted: float) -> None:
        """Append a token with its log-probabilities."""
        self.tokens.append(token)
        self.logps.append(logp)
        self.restricted.append(restricted)

    def completion(self, codec: Codec, sampling: Sampling, version: int) -> Completion:
        """Return the finished completion, without tokens after its end."""
        size, finish, text = cut(codec, self.tokens, sampling.stop)
        return Completion(
            text,
            tuple(self.tokens[:size]),
            finish,
            version,
            tuple(self.logps[:size]),
            tuple(self.restricted[:size]),
        )


def cut(codec: Codec, tokens: Sequence[int], stop: Sequence[str]) -> tuple[int, Finish, str]:
    """Find the end of a completion: the first end token, or the end of the first stop text.

    Returns:
        The number of tokens, the reason for the end, and the text without end token and stop text.
    """
    size = next((k + 1 for k, token in enumerate(tokens) if token in codec.end_ids), len(tokens))
    finish: Finish = "eos" if tokens[size - 1] in codec.end_ids else "length"
    text = codec.text(tokens[: size - 1] if finish == "eos" else tokens[:size])
    if any(s in text for s in stop):
        finish = "stop"
        size = next(k for k in range(1, size + 1) if any(s in codec.text(tokens[:k]) for s in stop))
        text = codec.text(tokens[:size])  # text after the stop text is not part of the completion
        text = text[: min(i for i in (text.find(s) for s in stop) if i >= 0)]
    return size, finish, text
