"""The figures of an annotator from a labelled file: the work of `palate evaluate judge`."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from palate.agreement import Judged, pair_agreement
from palate.data import Row, read_rows
from palate.data.account import RowError
from palate.errors import DataError
from palate.labelling.items import PREFERS
from palate.memory import key_of
from palate.ranking import Ranked, judge_metrics
from palate.statistics import Rate

GOLD = "data_score"
"""The reference column of scores that `palate annotate` makes of a data set's own `score`."""

PERFECT = 5.0
"""The score of a rubric with five points."""

BY_ORDER = ("p_chosen_shown_first", "p_chosen_shown_second")

_WITHOUT_ORDERS = ("consistency", "first_share", "ece")
"""Figures that need a judge's probabilities in both orders."""

Result = dict[str, Any]
Samples = list[dict[str, Any]]


def measure(
    source: str,
    *,
    split: str = "train",
    limit: int | None = None,
    gold: str | None = None,
    perfect: float = PERFECT,
) -> tuple[Result, Samples]:
    """Return the figures by name, and the pairs on which annotator and reference disagree most.

    Args:
        source: a file of `palate annotate`, or another source with its columns.
        split: split of the source, if it has splits.
        limit: number of rows to read, from the start; all by default.
        gold: the column with the reference scores of completions, higher is better; `data_score` by default.
            Pairs need none: the data's own preference is the reference.
        perfect: the score that counts as perfect.

    Raises:
        DataError: the source cannot be read, or a row lacks a label or a reference.
    """
    rows = list(read_rows(source, split=split, limit=limit))
    result: Result = {"data": source, "judge": _names(rows), "rows": len(rows)}
    samples: Samples = []
    if "chosen" in rows[0].columns:
        verdicts = [_judged(row) for row in rows]
        figures = asdict(pair_agreement(verdicts))
        if not any(name in row.columns for row in rows for name in BY_ORDER):
            figures = {name: value for name, value in figures.items() if name not in _WITHOUT_ORDERS}
        result |= {"kind": "pairs", **_plain(figures)}
        samples = _disagreements(rows, verdicts)
    else:
        items = _ranked(rows, gold or GOLD)
        counts = {
            "prompts": len(items),
            "unusable": sum(score is None for item in items for score in item.scores),
        }
        figures = judge_metrics(items, perfect=perfect)
        result |= {"kind": "scores", "reference": gold or GOLD, "perfect_score": perfect, **counts}
        result |= _plain(figures)
    return result | _costs(rows), samples


def _plain(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Return figures as JSON values: a rate as three numbers, and None for no number."""
    plain: dict[str, Any] = {}
    for name, value in figures.items():
        if isinstance(value, Rate):
            plain |= {name: value.rate, f"{name}_low": value.low, f"{name}_high": value.high}
        else:
            plain[name] = value
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in plain.items()}


def _judged(row: Row) -> Judged:
    columns = row.columns
    for name in ("prompt", "chosen", "rejected"):
        if columns.get(name) is None:
            raise _fault(row, f"{name} is missing", "a row of `palate annotate` with chosen and rejected")
    if PREFERS not in columns and "judge_verdicts" in columns:
        raise _fault(
            row,
            "the annotator itself made this pair, so its own winner cannot be the reference",
            f"labelled pairs with {PREFERS}; or label the completions without --pairs, and name a column of "
            "reference scores with --gold",
        )
    prefers = columns.get(PREFERS, "chosen")
    if prefers not in ("chosen", "rejected"):
        raise _fault(row, f"{PREFERS} is {prefers!r}", "`chosen` or `rejected`")
    first, second = _probabilities(row)
    longer = len(_text(columns["chosen"])) - len(_text(columns["rejected"]))
    cluster = key_of(columns["prompt"])
    if prefers == "chosen":
        return Judged(first, second, cluster, longer)
    # The preferred text is shown first where chosen is shown second.
    return Judged(_other(second), _other(first), cluster, -longer)


def _probabilities(row: Row) -> tuple[float | None, float | None]:
    """Return P(chosen wins) if it is shown first and second; from scores, certainty or a tie in both."""
    columns = row.columns
    if any(name in columns for name in BY_ORDER):
        values = [_number(row, name) for name in BY_ORDER]
        for name, p in zip(BY_ORDER, values, strict=True):
            if p is not None and not 0 <= p <= 1:
                raise _fault(row, f"{name} is {p}", "a probability in [0, 1]")
        return values[0], values[1]
    if "score_chosen" not in columns or "score_rejected" not in columns:
        raise _fault(row, "it has no label", f"{', '.join(BY_ORDER)}, or score_chosen and score_rejected")
    high, low = _number(row, "score_chosen"), _number(row, "score_rejected")
    p = None if high is None or low is None else 0.5 * ((high > low) + (high >= low))
    return p, p


def _ranked(rows: Sequence[Row], gold: str) -> list[Ranked]:
    """Return the scores and the reference scores, prompt by prompt."""
    groups: dict[str, tuple[list[float], list[float | None]]] = {}
    for row in rows:
        if "score" not in row.columns or "prompt" not in row.columns:
            raise _fault(row, "it has no score", "a row of `palate annotate` with prompt and score")
        reference = _number(row, gold) if gold in row.columns else None
        if reference is None:
            raise _fault(row, f"it has no reference score in the column {gold!r}", "one; name it with --gold")
        golds, scores = groups.setdefault(key_of(row.columns["prompt"]), ([], []))
        golds.append(reference)
        scores.append(_number(row, "score"))
    return [Ranked(golds, tuple(scores)) for golds, scores in groups.values()]


def _costs(rows: Sequence[Row]) -> Result:
    """Return the cost of the verdicts, if the annotator is a judge."""
    verdicts, tokens, cost = (
        math.fsum(_number(row, name) or 0.0 for row in rows)
        for name in ("judge_verdicts", "judge_tokens", "judge_cost")
    )
    if not verdicts:
        return {}
    return {
        "verdicts": round(verdicts),
        "cost_per_1000_verdicts": 1000 * cost / verdicts,
        "tokens_per_verdict": tokens / verdicts,
    }


def _disagreements(rows: Sequence[Row], verdicts: Sequence[Judged]) -> Samples:
    """Return the pairs with the other winner than in the reference, the most certain first."""
    wrong = sorted(
        ((v.p, row) for v, row in zip(verdicts, rows, strict=True) if v.p is not None and v.p < 0.5),
        key=lambda item: item[0],
    )
    samples = []
    for p, row in wrong:
        sides = ("chosen", "rejected") if row.columns.get(PREFERS) != "rejected" else ("rejected", "chosen")
        samples.append(
            {"prompt": _text(row.columns["prompt"]), "p": p, "texts": [_text(row.columns[s]) for s in sides]}
        )
    return samples


def _names(rows: Sequence[Row]) -> str:
    names = dict.fromkeys(str(row.columns["judge"]) for row in rows if row.columns.get("judge"))
    return ", ".join(names) or "unnamed annotator"


def _number(row: Row, name: str) -> float | None:
    value = row.columns.get(name)
    if value is None:
        return None
    # The comparison is false for NaN, and exact for an integer beyond all floats.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not (is_number and abs(value) <= sys.float_info.max):
        raise _fault(row, f"{name} is {value!r}", "a number, or nothing")
    return float(value)


def _other(p: float | None) -> float | None:
    return None if p is None else 1.0 - p


def _text(content: Any) -> str:
    """Return a text, or the last turn of a conversation."""
    if isinstance(content, str):
        return content
    last = content[-1] if isinstance(content, list) and content else {}
    said = last.get("content") if isinstance(last, Mapping) else None
    return said if isinstance(said, str) else ""


def _fault(row: Row, what: str, expected: str) -> DataError:
    return RowError(f"{row.where}: {what}; expected {expected}", row.where)
