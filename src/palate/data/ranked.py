"""Several answers per prompt with ranks or scores, from any of the usual forms of such data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from palate.data.account import Account, RowError
from palate.data.formats import SAME, read_prompts
from palate.errors import DataError
from palate.types import Prompt, said

ANSWER = ("completion", "response", "generation", "answer", "text")
"""Columns with one answer per row; their plurals have a list of answers."""

SCORE, RANK = ("score", "reward", "rating", "overall_score", "fine-grained_score"), ("rank",)
"""Columns with the score (higher is better) or the rank (lower is better) of an answer; plurals for lists."""


ALONE = "a prompt has only one answer"
MIXED = "a prompt has scores in some rows and ranks in others"
CONTRADICTORY = "answers are left out that a prompt has twice with different scores or ranks"


@dataclass(frozen=True)
class _Rated:
    """An answer with its number, of which higher is better."""

    text: str
    number: float
    scored: bool
    """The number is a score, comparable with those of other prompts, and not a rank."""


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

    Left out and counted are pairs of two equal texts, answers that a prompt has twice with different numbers,
    prompts that have scores in some rows and ranks in others, and prompts with fewer than two answers.

    Raises:
        DataError: the source cannot be read, a row cannot be used, or no prompt has two answers.
    """
    account = account or Account(strict=True)
    prompts = read_prompts(source, split=split, columns=columns, limit=limit, account=account)
    pooled: dict[str, tuple[Prompt, list[_Rated]]] = {}
    for prompt in prompts:
        try:
            answers = _answers(prompt)
        except RowError as error:
            account.skip(error)
            continue
        key = prompt.id if len(answers) == 1 else f"{prompt.id} {prompt.where}"
        pooled.setdefault(key, (prompt, []))[1].extend(answers)
    account.use(None)
    account.check(source, len(pooled))
    made = [_ranking(prompt, rated, account) for prompt, rated in pooled.values()]
    rankings = [ranking for ranking in made if ranking is not None]
    if not rankings:
        reasons = ", ".join(f"{tally.count} x {reason}" for reason, tally in account.dropped.items())
        raise DataError(
            f"{source}: no prompt has two answers to compare ({reasons}); expected several rows per prompt, "
            "or lists in completions and scores (or ranks)"
        )
    return rankings


def _ranking(prompt: Prompt, rated: Sequence[_Rated], account: Account) -> Ranking | None:
    """Return the ranking of a prompt; None, and a reason in the account, if nothing can be compared."""
    if len({answer.scored for answer in rated}) > 1:
        account.drop(MIXED, prompt.where)
        return None
    numbers: dict[str, set[float]] = {}
    for answer in rated:
        numbers.setdefault(answer.text, set()).add(answer.number)
    kept = [answer for answer in rated if len(numbers[answer.text]) == 1]
    if not kept and "chosen" in prompt.columns:
        account.drop(SAME, prompt.where)
        return None
    if len(kept) < len(rated):
        account.note(CONTRADICTORY, prompt.where)
    if len(kept) < 2:
        account.drop(ALONE, prompt.where)
        return None
    return Ranking(
        prompt, tuple(a.text for a in kept), tuple(a.number for a in kept), comparable=kept[0].scored
    )


def _answers(prompt: Prompt) -> list[_Rated]:
    """Return the answers of a row."""
    row = prompt.columns
    several = next((name for name in ANSWER if f"{name}s" in row), None)
    if several is None and "chosen" in row and "rejected" in row:
        both = (row["chosen"], 1.0), (row["rejected"], 0.0)
        return [_Rated(_text(prompt, text), number, scored=False) for text, number in both]
    if several is None:
        return [_one(prompt, row)]
    texts = row[f"{several}s"]
    if isinstance(texts, Sequence) and texts and all(isinstance(text, Mapping) for text in texts):
        return [_one(prompt, text) for text in texts]
    numbers, sign = _numbers(prompt, row, plural=True)
    if not _is_list(texts) or not _is_list(numbers) or len(texts) != len(numbers):
        raise RowError(
            f"{prompt.where}: {several}s and their numbers are not lists of the same length; expected one "
            "number for each answer",
            prompt.where,
        )
    return [
        _Rated(_text(prompt, text), sign * _number(prompt, number), scored=sign > 0)
        for text, number in zip(texts, numbers, strict=True)
    ]


def _one(prompt: Prompt, row: Mapping[str, Any]) -> _Rated:
    """Return one answer with its number."""
    single = next((name for name in ANSWER if name in row), None)
    if single is None:
        raise RowError(
            f"{prompt.where}: no answer is given; expected a column {ANSWER[0]} with a text or {ANSWER[0]}s "
            f"with a list. Columns beside the prompt: {', '.join(row) or 'none'}",
            prompt.where,
        )
    (number,), sign = _numbers(prompt, row, plural=False)
    return _Rated(_text(prompt, row[single]), sign * _number(prompt, number), scored=sign > 0)


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
