"""Several answers per prompt with ranks or scores, from any of the usual forms of such data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from palate.data.account import Account, RowError
from palate.data.formats import read_prompts
from palate.errors import DataError
from palate.types import Prompt, said

ANSWER = ("completion", "response", "answer", "text")
"""Columns with one answer per row; their plurals have a list of answers."""

SCORE, RANK = ("score", "reward", "rating"), ("rank",)
"""Columns with the score (higher is better) or the rank (lower is better) of an answer."""


@dataclass(frozen=True)
class Ranking:
    """A prompt with at least two answers, and people's opinion of them.

    Attributes:
        prompt: the prompt.
        answers: the texts.
        gold: a number for each answer; higher is better, and equal numbers are ties. Numbers of different
            prompts are comparable only if `comparable`.
        comparable: `gold` has scores on one scale for all prompts, not ranks within a prompt.
    """

    prompt: Prompt
    answers: tuple[str, ...]
    gold: tuple[float, ...]
    comparable: bool = False


def read_rankings(
    source: str,
    *,
    split: str = "train",
    columns: Mapping[str, str] = MappingProxyType({}),
    limit: int | None = None,
    account: Account | None = None,
) -> list[Ranking]:
    """Return the rankings of a data set, in one of three forms.

    - A row per prompt, with lists: `prompt`, `completions`, and `scores` or `ranks`.
    - A row per answer: `prompt`, `completion`, and `score` or `rank`. Rows with the same prompt belong
      together. A `score` is better if it is higher, a `rank` if it is lower.
    - A row per comparison, with `chosen` and `rejected`.

    Prompts with fewer than two answers are left out and counted.

    Raises:
        DataError: the source cannot be read, a row cannot be used, or no prompt has two answers.
    """
    account = account or Account(strict=True)
    prompts = read_prompts(source, split=split, columns=columns, limit=limit, account=account)
    pooled: dict[str, tuple[Prompt, list[tuple[str, float]], bool]] = {}
    for prompt in prompts:
        try:
            answers, comparable = _answers(prompt)
        except RowError as error:
            account.skip(error)
            continue
        key = prompt.id if len(answers) == 1 else f"{prompt.id} {prompt.where}"
        pooled.setdefault(key, (prompt, [], comparable))[1].extend(answers)
    account.use(None)
    account.check(source, len(pooled))
    rankings = []
    for prompt, rated, comparable in pooled.values():
        if len(rated) < 2:
            account.drop("a prompt has only one answer", prompt.where)
            continue
        texts, gold = zip(*rated, strict=True)
        rankings.append(Ranking(prompt, texts, gold, comparable))
    if not rankings:
        raise DataError(
            f"{source}: no prompt has two answers; expected several rows per prompt, or lists in completions "
            "and scores (or ranks)"
        )
    return rankings


def _answers(prompt: Prompt) -> tuple[list[tuple[str, float]], bool]:
    """Return the answers of a row with their numbers (higher is better), and whether these are scores."""
    row = prompt.columns
    if "chosen" in row and "rejected" in row:
        return [(_text(prompt, row["chosen"]), 1.0), (_text(prompt, row["rejected"]), 0.0)], False
    several = next((name for name in ANSWER if f"{name}s" in row), None)
    if several is not None:
        texts, numbers, sign = row[f"{several}s"], *_numbers(prompt, plural=True)
        if not isinstance(texts, Sequence) or isinstance(texts, str) or len(texts) != len(numbers):
            raise RowError(
                f"{prompt.where}: {several}s and their numbers are not lists of the same length; expected "
                "one number for each answer",
                prompt.where,
            )
    else:
        single = next((name for name in ANSWER if name in row), None)
        if single is None:
            raise RowError(
                f"{prompt.where}: no answer is given; expected a column {ANSWER[0]} with a text or "
                f"{ANSWER[0]}s with a list. Columns: {', '.join(row) or 'none'}",
                prompt.where,
            )
        texts, (numbers, sign) = [row[single]], _numbers(prompt, plural=False)
    rated = [(_text(prompt, t), sign * _number(prompt, n)) for t, n in zip(texts, numbers, strict=True)]
    return rated, sign > 0


def _numbers(prompt: Prompt, *, plural: bool) -> tuple[Sequence[Any], int]:
    """Return the scores or ranks of a row, and the sign that makes higher numbers better."""
    for names, sign in ((SCORE, 1), (RANK, -1)):
        for name in names:
            value = prompt.columns.get(f"{name}s" if plural else name)
            if value is not None:
                return (value if plural else [value]), sign
    ending = "s" if plural else ""
    raise RowError(
        f"{prompt.where}: no score is given; expected a column score{ending} (higher is better) or "
        f"rank{ending} (lower is better). Columns: {', '.join(prompt.columns) or 'none'}",
        prompt.where,
    )


def _number(prompt: Prompt, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise RowError(f"{prompt.where}: a score or rank is {value!r}; expected a number", prompt.where)
    return number


def _text(prompt: Prompt, value: Any) -> str:
    """Return an answer as text; a list of turns counts with its last turn."""
    turns = isinstance(value, Sequence) and not isinstance(value, str) and value
    text = said(value[-1]) if turns and isinstance(value[-1], Mapping) else value
    if not isinstance(text, str):
        raise RowError(f"{prompt.where}: an answer is {value!r:.60}; expected a text", prompt.where)
    return text
