"""One side of an evaluation: a model, loaded and sampled, or the completions in the data."""

from __future__ import annotations

import gc
import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from palate.data import Account, read_demonstrations
from palate.errors import DataError
from palate.evaluation.config import EvaluateConfig
from palate.learn.state import weights_hash
from palate.loops.records import tokenized
from palate.model import LoadedModel, Snapshot, load_model
from palate.model.codec import Codec
from palate.run import Run
from palate.run.seeds import seed_of
from palate.types import Demonstration, Group, Prompt

LIMIT = 1 << 20
"""Largest size of a .txt file in bytes."""


@dataclass(frozen=True)
class Side:
    """Measurements of one side.

    Attributes:
        name: the model as given, or `data`.
        groups: n completions of each prompt.
        own: one completion of each prompt, sampled at temperature 1 without restrictions, for the KL.
        own_logps: its log-probability under the model, in nats.
        text_logps: log-probabilities of the user's own text: sum in nats, and number of tokens.
        text_truncated: number of its texts that are longer than the model's context.
        vocabulary: hash of the vocabulary; two models can score each other's tokens if theirs are equal.
    """

    name: str
    groups: tuple[Group, ...]
    own: tuple[Group, ...] = ()
    own_logps: tuple[float, ...] = ()
    text_logps: tuple[float, int] | None = None
    text_truncated: int = 0
    vocabulary: str = ""

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability of a token of the user's own text; NaN without text."""
        if self.text_logps is None:
            return math.nan
        total, tokens = self.text_logps
        return math.exp(-total / tokens)


@dataclass
class Open:
    """A loaded model with its snapshot."""

    model: LoadedModel
    snapshot: Snapshot
    vocabulary: str = field(default="")

    @property
    def codec(self) -> Codec:
        """The model's tokens."""
        return self.model.codec


@contextmanager
def opened(name: str, cfg: EvaluateConfig, run: Run) -> Iterator[Open]:
    """Load a model for sampling and scoring; the results go to the run's journal."""
    model = load_model(cfg.loading(name), trainable=False)
    key = weights_hash(model.network)
    run.require_same(f"the weights of {name}", key, f"the model {name}")
    snapshot = Snapshot(
        0,
        lambda: nullcontext(model),
        micro_batch_tokens=2048,
        observe=run.observe,
        memory=lambda: run.memory,
        name=f"{name} {key}",
    )
    tokenizer: Any = model.codec.tokenizer
    words = sorted(tokenizer.get_vocab().items())
    yield Open(model, snapshot, hashlib.sha256(repr(words).encode("utf-8", "surrogatepass")).hexdigest())
    gc.collect()  # frees the model before the next one is loaded


def fitting(one: Open, prompts: Sequence[Prompt], cfg: EvaluateConfig, account: Account) -> list[Prompt]:
    """Return the prompts that leave room for a completion; the others are skipped and counted."""

    def checked(prompt: Prompt) -> Prompt:
        one.codec.room(prompt, need=cfg.max_new_tokens)
        return prompt

    return tokenized(one.codec, prompts, cfg.data, account, checked)


def sampled(
    one: Open, name: str, prompts: Sequence[Prompt], cfg: EvaluateConfig, *, place: int, own: bool
) -> Side:
    """Sample one side.

    Args:
        one: the loaded model.
        name: its name.
        prompts: the held-out prompts.
        cfg: the options.
        place: number of the side: sides draw independently, since with shared random numbers small but even
            differences would win every time.
        own: also sample for the KL.
    """
    seed = seed_of(cfg.seed, "evaluate", place)
    groups = one.snapshot.sample(prompts, cfg.n, cfg.sampling, seed=seed)
    drawn: list[Group] = []
    logps: list[float] = []
    if own:
        plain = cfg.sampling.unrestricted
        known = cfg.sampling == plain and cfg.n == 1
        drawn = groups if known else one.snapshot.sample(prompts, 1, plain, seed=seed_of(seed, "kl"))
        logps = log_likelihoods(one, drawn)
    text, truncated = perplexity_of(one, cfg) if cfg.text is not None else (None, 0)
    return Side(name, tuple(groups), tuple(drawn), tuple(logps), text, truncated, one.vocabulary)


def log_likelihoods(one: Open, groups: Sequence[Group]) -> list[float]:
    """Return the log-probability of each completion under a model, in nats."""
    return [float(value) for value in one.snapshot.logps(groups, kept=True).sum().double()]


def answered(codec: Codec, rows: Sequence[Demonstration], n: int) -> Side:
    """Return the completions in the data as a side, in a model's tokens; the same one for each of the n."""
    examples = [codec.example(row) for row in rows]
    return Side("data", tuple(Group(e.prompt.to_sample(), (e.completion,) * n) for e in examples))


def perplexity_of(one: Open, cfg: EvaluateConfig) -> tuple[tuple[float, int], int]:
    """Return the log-probability of the user's own text in nats with its number of tokens, and the number of
    texts that are truncated to the model's context.
    """
    rows = own_text(str(cfg.text), cfg)
    examples = [one.codec.example(row) for row in rows]
    truncated = sum(
        e.completion.finish == "length" and row.finish != "length"
        for e, row in zip(examples, rows, strict=True)
    )
    with torch.no_grad():
        values = one.snapshot.logps(examples, kept=True)
    return (float(values.sum().double().sum()), int(values.mask.sum())), truncated


def own_text(source: str, cfg: EvaluateConfig) -> list[Demonstration]:
    """Read the user's own text: the paragraphs of a .txt file, or demonstrations.

    Raises:
        DataError: it cannot be read, or has no text.
    """
    if not source.endswith(".txt"):
        account = Account(strict=cfg.strict, max_bad_rows=cfg.max_bad_rows)
        return read_demonstrations(source, columns=cfg.map, account=account)
    file = Path(source).expanduser()
    try:
        if file.stat().st_size > LIMIT:
            raise DataError(f"{source!r} has more than {LIMIT >> 20} MB; give --text a part of it")
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise DataError(f"--text {source!r} cannot be read: {reason}") from None
    parts = [part.strip() for part in text.replace("\r\n", "\n").split("\n\n") if part.strip()]
    if not parts:
        raise DataError(f"--text {source!r} has no text; expected paragraphs with empty lines between them")
    return [
        Demonstration(Prompt("", where=f"{source}, paragraph {i}"), part) for i, part in enumerate(parts, 1)
    ]
