"""The rows to label."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from palate.config import DataConfig
from palate.data import Account, read_comparisons, read_demonstrations
from palate.errors import DataError
from palate.types import Comparison, Completion, Content, Finish, Group, Prompt, said

PREFERS = "data_prefers"
"""The column that says which of a row's answers the data prefer: `chosen` or `rejected`."""

LABELS = (
    *("score", "score_chosen", "score_rejected", "margin", "label", "status", PREFERS),
    *("p_chosen_shown_first", "p_chosen_shown_second"),
    *("judge", "judge_verdicts", "judge_tokens", "judge_cost"),
)
"""The columns that labelling adds, besides the texts."""

_FEW = 20
"""Rows that are read to see of which kind they are."""


@dataclass(frozen=True)
class Item:
    """A row to label.

    Attributes:
        prompt: the prompt; its columns are the row's other columns.
        answers: one completion, or two of which the data prefer the first.
        finishes: the finish reason of each.
    """

    prompt: Prompt
    answers: tuple[Content, ...]
    finishes: tuple[Finish, ...]

    @property
    def group(self) -> Group:
        """The texts as annotators take them. Data have no tokens, so each completion has a placeholder."""
        return Group(
            self.prompt,
            tuple(
                Completion(text if isinstance(text, str) else said(text[-1]), (0,), finish)
                for text, finish in zip(self.answers, self.finishes, strict=True)
            ),
        )


def read_items(cfg: DataConfig) -> tuple[list[Item], Account]:
    """Return the rows of the data: pairs if they have chosen and rejected, else prompts with a completion.

    Rows with a false `label` are included. A row with labels of an earlier annotation is read as it was
    before it.

    Raises:
        DataError: the data cannot be read, or too few rows can be used.
    """
    account = Account(strict=cfg.strict, max_bad_rows=cfg.max_bad_rows)
    read: dict[str, Any] = {"split": cfg.split, "columns": cfg.map, "marked": True}
    if _are_pairs(cfg, read):
        pairs, _ = read_comparisons(cfg.data, limit=cfg.limit, account=account, **read)
        return [_pair(pair) for pair in pairs], account
    rows = read_demonstrations(cfg.data, limit=cfg.limit, account=account, **read)
    return [Item(row.prompt, (row.completion,), (row.finish,)) for row in rows], account


def _are_pairs(cfg: DataConfig, read: Mapping[str, Any]) -> bool:
    """Return True if the first rows are pairs."""
    account = Account(max_bad_rows=cfg.max_bad_rows)
    try:
        read_comparisons(cfg.data, limit=min(_FEW, cfg.limit or _FEW), account=account, **read)
    except DataError:
        return bool(account.dropped)  # pairs of equal texts are pairs
    return True


def _pair(row: Comparison) -> Item:
    answers, finishes = (row.chosen, row.rejected), (row.chosen_finish, row.rejected_finish)
    columns = row.prompt.columns
    if PREFERS in columns:
        if columns[PREFERS] == "rejected":
            answers, finishes = answers[::-1], finishes[::-1]
        columns = {name: value for name, value in columns.items() if name not in LABELS}
    return Item(replace(row.prompt, columns=columns), answers, finishes)
