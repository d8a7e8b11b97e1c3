"""Records from data, in a learner's tokens, and what tells one set of data from another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.config import DataConfig
from palate.data import read_comparisons
from palate.errors import DataError
from palate.journal import key_of
from palate.learn import Learner
from palate.run import Run
from palate.select import same
from palate.types import Comparison, Pair, Prompt, Record


def read_pairs(policy: Learner, source: str, cfg: DataConfig, run: Run) -> tuple[list[Pair], int]:
    """Preference pairs of a file or data set, by the configuration's `split`, `map` and `limit`.

    Returns:
        The pairs in the policy's tokens, and how many were left out because chosen and rejected are the
        same, or became so by being cut to the context. That is said, too.

    Raises:
        DataError: none is left, or the data cannot be used.
        RunError: the run began with other pairs.
    """
    rows, same = read_comparisons(source, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    pairs, cut_same = pairs_of(policy, rows, source)
    run.require_same(f"the pairs of {source}", content_key(pairs), f"the data {source!r}")
    tell_same(run, same + cut_same)
    return pairs, same + cut_same


def pairs_of(policy: Learner, rows: Sequence[Comparison], source: str) -> tuple[list[Pair], int]:
    """Comparisons in the policy's tokens, and how many were left out for having become equal by being cut.

    Raises:
        DataError: none is left; `source` is what the message calls the data.
    """
    pairs = [policy.model.codec.pair(row) for row in rows]
    kept = [pair for pair in pairs if not same(pair.chosen, pair.rejected)]
    if not kept:
        raise DataError(
            f"{source}: cut to the model's context, chosen and rejected are the same in every pair"
        )
    return kept, len(pairs) - len(kept)


def tell_same(run: Run, count: int) -> None:
    """Say how many pairs were left out for being none."""
    if count:
        run.display.say(f"left out {count} pairs in which chosen and rejected are the same")


def content_key(items: Sequence[Prompt | Record]) -> str:
    """What tells one set of data from another: contents, and the columns that a reward may read."""
    return key_of([_facts(item) for item in items])


def once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Each prompt once; two rows that ask the same, but differ in another column, are two."""
    return list({content_key([prompt]): prompt for prompt in prompts}.values())


def _facts(item: Prompt | Record) -> list[Any]:
    prompt = item if isinstance(item, Prompt) else item.prompt
    texts = [] if isinstance(item, Prompt) else [c.token_ids for c in item.completions]
    margin = [item.margin] if isinstance(item, Pair) and item.margin is not None else []
    return [prompt.id, dict(prompt.columns), texts, *margin]
