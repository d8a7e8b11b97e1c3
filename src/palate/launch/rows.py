"""Read a run's data, and report unused rows and columns."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from palate.data import Account, StoredRows
from palate.given import GivenReward
from palate.journal import key_of
from palate.learn import Learner
from palate.loops import Records, account_of, records_of, records_on_disk, rows_on_disk
from palate.run import Run
from palate.types import Prompt

_NO_FUNCTIONS = ("length:", "regex:", "model:", "ranker:", "judge:")
"""Rewards that read no columns of the data."""


def read_rows(read: Callable[..., Any], cfg: Any, *, held_out: bool = False) -> tuple[list[Any], Account]:
    """Read the data, or the optional held-out data, with an account of them."""
    account = account_of(cfg)
    if held_out and cfg.eval_data is None:
        return [], account
    source, split, limit = (
        (cfg.eval_data, cfg.eval_split, cfg.eval_limit) if held_out else (cfg.data, cfg.split, cfg.limit)
    )
    rows = read(source, split=split, columns=cfg.map, limit=limit, account=account)
    return (rows[0] if isinstance(rows, tuple) else rows), account


@dataclass(frozen=True)
class Source:
    """A data set of a run in files, with its account.

    Attributes:
        name: the data set.
        rows: its rows without tokens; None for held-out data that are not given.
        account: the account of the rows.
    """

    name: str
    rows: StoredRows | None
    account: Account

    def __len__(self) -> int:
        """Return the number of rows."""
        return 0 if self.rows is None else len(self.rows)


def stored(scan: Callable[..., Iterator[Any]], cfg: Any, run: Run, *, held_out: bool = False) -> Source:
    """Return the rows of the data, or of the optional held-out data, in files of the run."""
    account = account_of(cfg)
    source, split, limit = (
        (cfg.eval_data, cfg.eval_split, cfg.eval_limit) if held_out else (cfg.data, cfg.split, cfg.limit)
    )
    if source is None:
        return Source("", None, account)
    rows = rows_on_disk(run, scan, source, account, split=split, columns=dict(cfg.map), limit=limit)
    return Source(source, rows, account)


def prepared(
    data: Source, unseen: Source, learner: Learner, cfg: Any, run: Run, *, name: str
) -> tuple[Sequence[Any], Sequence[Any]]:
    """Return the records of the data and of the held-out data in the learner's tokens, and report on both.

    Raises:
        DataError: no record is left, or too many rows cannot be used.
        RunError: the run started with other data.
    """
    codec, parts = learner.model.codec, []
    for part in (data, unseen):
        own = [] if part.rows is None else records_on_disk(run, codec, part.rows, part.name, part.account)
        parts.append(own)
    report_rows(run, cfg, data.account, unseen.account)
    key = key_of(*(part.key for part in parts if isinstance(part, Records)))
    run.require_same(f"the records of the {name}", key, "the data")
    return parts[0], parts[1]


def with_room(
    policy: Learner, prompts: Sequence[Prompt], source: str, account: Account, cfg: Any
) -> list[Prompt]:
    """Return the prompts that the chat template accepts and that leave room for a completion."""

    def fitting(prompt: Prompt) -> Prompt:
        policy.model.codec.room(prompt, need=cfg.max_new_tokens)
        return prompt

    return records_of(policy, prompts, source, account, fitting) if prompts else []


def report_rows(run: Run, cfg: Any, account: Account, held_out: Account) -> None:
    """Report unused rows and columns, without the columns that a reward function or the method reads."""
    functions = any(_is_function(spec) for spec in getattr(cfg, "reward", ()))
    named = {value for _, value in cfg if isinstance(value, str)}
    # The held-out data may be another split of the same source, and needs an account of its own.
    beside = f"{cfg.eval_data} (held-out)" if cfg.eval_data == cfg.data else cfg.eval_data
    for name, one in ((cfg.data, account), (beside, held_out)):
        if name is not None:
            one.use(None if functions else named)
            run.report_data(name, one)


def _is_function(spec: Any) -> bool:
    """Return True for a reward that is a Python function, which may read any column."""
    return isinstance(spec, GivenReward) or (":" in spec and not spec.startswith(_NO_FUNCTIONS))
