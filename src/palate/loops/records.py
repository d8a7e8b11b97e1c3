"""Records from data as tokens of a learner, and keys of their content."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any, TypeVar

from palate.config import DataConfig
from palate.data import Account, read_demonstrations, scan_comparisons
from palate.errors import DataError
from palate.journal import key_of
from palate.learn import Learner
from palate.loops.prepared import CUT_EQUAL, REPEATED, records_on_disk, rows_on_disk
from palate.model.codec import Codec
from palate.run import Run
from palate.select import same
from palate.types import Comparison, Demonstration, Example, Pair, Prompt, Record

T = TypeVar("T", bound=Prompt | Comparison | Demonstration)
R = TypeVar("R", bound=Prompt | Record)
S = TypeVar("S", bound=Record)


def read_pairs(policy: Learner, source: str, cfg: DataConfig, run: Run) -> tuple[Sequence[Pair], int]:
    """Read preference pairs of a file or data set, with the configuration's `split`, `map` and `limit`.

    Returns:
        The pairs as tokens of the policy, and the number of dropped pairs, whose completions are the same or
        become the same after truncation to the context. The display shows that number.

    Raises:
        DataError: no pair is left, or the data cannot be used.
        RunError: the run started with other pairs.
    """
    account = account_of(cfg)
    options = {"split": cfg.split, "columns": dict(cfg.map), "limit": cfg.limit}
    rows = rows_on_disk(run, scan_comparisons, source, account, **options)
    pairs = records_on_disk(run, policy.model.codec, rows, source, account)
    run.require_same(f"the records of {source}", pairs.key, f"the data {source!r}")
    run.report_data(source, account)
    return pairs, account.dropped_rows


def read_examples(
    policy: Learner, source: str, cfg: DataConfig, run: Run, *, name: str, limit: int | None
) -> list[Example]:
    """Read prompts with completions of a file or data set, with the configuration's `split` and `map`.

    Args:
        policy: its tokens are used.
        source: the data.
        cfg, run: of the method.
        name: the data's name in the journal, by which a resumed run checks that they are the same.
        limit: number of rows to use; None for all.

    Raises:
        DataError: no row is left, or the data cannot be used.
        RunError: the run started with other data.
    """
    account = account_of(cfg)
    rows = read_demonstrations(source, split=cfg.split, columns=cfg.map, limit=limit, account=account)
    examples = records_of(policy, rows, source, account, policy.model.codec.example)
    account.use(None)  # a reward may read any column
    run.report_data(source, account)
    run.require_same(name, content_key(examples), f"the data {source!r}")
    return examples


def account_of(cfg: DataConfig) -> Account:
    """Return an empty account with the configuration's limits for rows that cannot be used."""
    return Account(strict=cfg.strict, max_bad_rows=cfg.max_bad_rows)


def distinct(pairs: Sequence[S], source: str, account: Account) -> list[S]:
    """Return the pairs whose two completions differ in tokens; the others are counted.

    Raises:
        DataError: none is left; the message names `source`.
    """
    kept = [pair for pair in pairs if not same(*pair.completions)]
    for _ in range(len(pairs) - len(kept)):
        account.drop(CUT_EQUAL)
    if not kept:
        raise DataError(
            f"{source}: after truncation to the model's context, chosen and rejected are the same in every "
            "pair; use shorter texts or a larger --max-length"
        )
    return kept


def records_of(
    policy: Learner, rows: Iterable[T], source: str, account: Account, tokenize: Callable[[T], R]
) -> list[R]:
    """Return rows of data in the policy's tokens; rows that cannot be used are skipped and counted.

    Raises:
        DataError: none is left, or too many cannot be used; the message names `source`.
    """
    return tokenized(policy.model.codec, rows, source, account, tokenize)


def tokenized(
    codec: Codec, rows: Iterable[T], source: str, account: Account, tokenize: Callable[[T], R]
) -> list[R]:
    """Return rows of data in the codec's tokens, as `records_of` does, and count their lengths and repeats.

    Raises:
        DataError: none is left, or too many cannot be used; the message names `source`.
    """
    codec.account = account
    records = []
    for block in codec.in_blocks(rows):
        for row in block:
            try:
                records.append(tokenize(row))
            except DataError as error:
                account.skip(error)
    account.check(source, len(records))
    _measure(codec, records, account)
    return records


def _measure(codec: Codec, records: Sequence[Prompt | Record], account: Account) -> None:
    """Note the length of each row in tokens, and the rows that repeat an earlier one."""
    seen: set[Hashable] = set()
    for record in records:
        prompt = record if isinstance(record, Prompt) else record.prompt
        answers = () if isinstance(record, Prompt) else tuple(c.token_ids for c in record.completions)
        account.lengths.append(len(codec.prompt_ids(prompt)) + max(map(len, answers), default=0))
        key = prompt.id, answers, "" if answers else repr(dict(prompt.columns))
        if key in seen:
            account.note(REPEATED, prompt.where)
        seen.add(key)


def content_key(items: Sequence[Prompt | Record]) -> str:
    """Return a key of a data set's contents, including the columns that a reward may read."""
    return key_of([_facts(item) for item in items])


def once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return each prompt once; rows with the same prompt but different other columns are kept."""
    return list({content_key([prompt]): prompt for prompt in prompts}.values())


def _facts(item: Prompt | Record) -> list[Any]:
    prompt = item if isinstance(item, Prompt) else item.prompt
    texts = [] if isinstance(item, Prompt) else [c.token_ids for c in item.completions]
    margin = [item.margin] if isinstance(item, Pair) and item.margin is not None else []
    return [prompt.id, dict(prompt.columns), texts, *margin]
