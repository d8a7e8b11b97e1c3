"""A look at data before training: each row in a model's tokens, without the model's weights.

`palate inspect` prints it. Rows pass through the same readers and the same codec as in a run, so what is
shown here is what a run learns, skips and leaves out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from palate import loops
from palate.config import DataConfig
from palate.data import Account, read_comparisons, read_demonstrations, read_prompts
from palate.errors import DataError
from palate.method import Data
from palate.types import Comparison, Completion, Demonstration, Prompt

if TYPE_CHECKING:
    from palate.model import Codec, Shown

NAMES: Mapping[Data, tuple[str, ...]] = {
    "prompts": (),
    "demonstrations": ("completion",),
    "pairs": ("chosen", "rejected"),
}
"""The names of a row's answers, by the kind of rows."""

_FEW = 20
"""Rows that are read to see of which kind they are."""


@dataclass(frozen=True)
class Rows:
    """Rows as they are read, without tokens."""

    kind: Data
    records: Sequence[Any]
    """`Prompt`, `Demonstration` or `Comparison` records."""
    account: Account


@dataclass(frozen=True)
class InspectedRow:
    """A row in tokens and as texts.

    Attributes:
        prompt: the prompt, with the tokens that come before its answers.
        completions: its answers as they are learnt: none, one, or chosen and rejected.
        text: the prompt as text, special tokens included.
        tokens: the number of the prompt's tokens.
        shown: the answers as texts, in the order of `completions`.
    """

    prompt: Prompt
    completions: tuple[Completion, ...]
    text: str
    tokens: int
    shown: tuple[Shown, ...]

    @property
    def matches(self) -> bool:
        """True if the tokens are those of the chat template's own rendering."""
        return all(answer.matches for answer in self.shown)

    @property
    def cut(self) -> bool:
        """True if an answer is longer than the model's context allows."""
        return any(answer.cut or answer.tokens_learnt < answer.tokens for answer in self.shown)


@dataclass(frozen=True)
class Inspection:
    """All rows that are used, and the account of the others."""

    kind: Data
    rows: Sequence[InspectedRow]
    account: Account

    def lengths(self) -> dict[str, list[int]]:
        """Return the numbers of tokens by part: prompt and answers, without the context's limit."""
        parts = {"prompt": [row.tokens for row in self.rows]}
        for i, name in enumerate(NAMES[self.kind]):
            parts[name] = [row.shown[i].tokens for row in self.rows]
        return parts

    def lines(self, most: int) -> list[dict[str, Any]]:
        """Return the first rows as plain data."""
        return [self._line(row) for row in self.rows[:most]]

    def _line(self, row: InspectedRow) -> dict[str, Any]:
        answer = row.shown[0] if row.shown else None
        line: dict[str, Any] = {
            "where": row.prompt.where,
            "prompt": row.text,
            "completion": answer.completion if answer else "",
        }
        if self.kind == "pairs":
            line["rejected"] = row.shown[1].completion
        return line | {
            "prompt_tokens": row.tokens,
            "completion_tokens": answer.tokens if answer else 0,
            "learnt": answer.tokens_learnt if answer else 0,
            "matches_template": row.matches,
            "unused": list(dict.fromkeys(self.account.unused_of.get(row.prompt.where, ()))),
        }


def read(cfg: DataConfig, kind: Data | None = None) -> Rows:
    """Read rows as a method reads them that learns from this kind; None takes the first kind that fits.

    Raises:
        DataError: the data cannot be read, or too few rows can be used.
    """
    kind = kind or _kind(cfg)
    account = Account(strict=cfg.strict, max_bad_rows=cfg.max_bad_rows, by_row=True)
    return Rows(kind, _read(kind, cfg, cfg.limit, account), account)


def look(codec: Codec, rows: Rows, source: str, *, need: int = 1) -> Inspection:
    """Return rows in the codec's tokens.

    Args:
        codec: the tokenizer with the chat template.
        rows: what `read` returns.
        source: the name of the data, for messages.
        need: tokens that a prompt must leave for a sampled completion.

    Raises:
        DataError: too many rows cannot be used, or none is left.
    """

    def prompt(row: Prompt) -> InspectedRow:
        codec.room(row, need=need)
        return InspectedRow(row, (), codec.shown_prompt(row), len(codec.prompt_ids(row)), ())

    def demonstration(row: Demonstration) -> InspectedRow:
        return _answered(codec, row.prompt, (row.completion,), (row.finish,))

    def comparison(row: Comparison) -> InspectedRow:
        finishes = (row.chosen_finish, row.rejected_finish)
        return _answered(codec, row.prompt, (row.chosen, row.rejected), finishes)

    looks: Mapping[Data, Callable[[Any], InspectedRow]] = {
        "prompts": prompt,
        "demonstrations": demonstration,
        "pairs": comparison,
    }
    looked = loops.tokenized(codec, rows.records, source, rows.account, looks[rows.kind])
    if rows.kind == "pairs":
        looked = loops.distinct(looked, source, rows.account)
    return Inspection(rows.kind, looked, rows.account)


def _answered(codec: Codec, prompt: Prompt, contents: Any, finishes: Any) -> InspectedRow:
    prompt, completions, shown = codec.shown(prompt, contents, finishes)
    return InspectedRow(prompt, completions, shown[0].prompt, len(codec.prompt_ids(prompt)), shown)


def _kind(cfg: DataConfig) -> Data:
    """Return the kind of the first rows."""
    kinds: tuple[Data, ...] = ("pairs", "demonstrations", "prompts")
    limit = min(_FEW, cfg.limit or _FEW)
    for kind in kinds[:-1]:
        try:
            _read(kind, cfg, limit, Account(max_bad_rows=cfg.max_bad_rows))
        except DataError:
            continue
        return kind
    return kinds[-1]


def _read(kind: Data, cfg: DataConfig, limit: int | None, account: Account) -> Sequence[Any]:
    options: dict[str, Any] = {"split": cfg.split, "columns": cfg.map, "limit": limit, "account": account}
    if kind == "pairs":
        return read_comparisons(cfg.data, **options)[0]
    return (read_prompts if kind == "prompts" else read_demonstrations)(cfg.data, **options)
