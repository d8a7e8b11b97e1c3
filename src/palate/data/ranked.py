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

ANSWER = ("completion", "response", "generation", "answer", "text")
"""Columns with one answer per row; their plurals have a list of answers."""

SCORE, RANK = ("score", "reward", "rating", "overall_score", "fine-grained_score"), ("rank",)
"""Columns with the score (higher is better) or the rank (lower is better) of an answer; plurals for lists."""


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

    - A row per prompt, with lists: `prompt`, `completions`, and `scores` or `ranks`; or with a list of
      objects that each have an answer and its score, as in UltraFeedback.
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
    several = next((name for name in ANSWER if f"{name}s" in row), None)
    if several is None and "chosen" in row and "rejected" in row:
        return [(_text(prompt, row["chosen"]), 1.0), (_text(prompt, row["rejected"]), 0.0)], False
    if several is None:
        return _one(prompt, row)
    texts = row[f"{several}s"]
    if isinstance(texts, Sequence) and texts and all(isinstance(text, Mapping) for text in texts):
        rated = [_one(prompt, text) for text in texts]
        return [one for own, _ in rated for one in own], all(comparable for _, comparable in rated)
    numbers, sign = _numbers(prompt, row, plural=True)
    if not _is_list(texts) or not _is_list(numbers) or len(texts) != len(numbers):
        raise RowError(
            f"{prompt.where}: {several}s and their numbers are not lists of the same length; expected one "
            "number for each answer",
            prompt.where,
        )
    return [
        (_text(prompt, t), sign * _number(prompt, n)) for t, n in zip(texts, numbers, strict=True)
    ], sign > 0


def _one(prompt: Prompt, row: Mapping[str, Any]) -> tuple[list[tuple[str, float]], bool]:
    """Return one answer with its number, and whether that is a score."""
    single = next((name for name in ANSWER if name in row), None)
    if single is None:
        raise RowError(
            f"{prompt.where}: no answer is given; expected a column {ANSWER[0]} with a text or {ANSWER[0]}s "
            f"with a list. Columns beside the prompt: {', '.join(row) or 'none'}",
            prompt.where,
        )
    (number,), sign = _numbers(prompt, row, plural=False)
    return [(_text(prompt, row[single]), sign * _number(prompt, number))], sign > 0


def _numbers(prompt: Prompt, row: Mapping[str, Any], *, plural: bool) -> tuple[Sequence[Any], int]:
    """Return the scores or ranks of a row, and the sign that makes higher numbers better."""
    for names, sign in ((SCORE, 1), (RANK, -1)):
        for name in names:
            for value in (row.get(f"{name}s"), row.get(name)) if plural else (row.get(name),):
                if value is not None:
                    return (value if plural else [value]), sign
    ending = "s" if plural else ""
    raise RowError(
        f"{prompt.where}: no score is given; expected a column score{ending} (higher is better) or "
        f"rank{ending} (lower is better). Columns: {', '.join(row) or 'none'}",
        prompt.where,
    )


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str)


def _number(prompt: Prompt, value: Any) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
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
