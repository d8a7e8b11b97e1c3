"""Records from data, in a learner's tokens, and keys of their content."""

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
    """Read preference pairs of a file or data set, by the configuration's `split`, `map` and `limit`.

    Returns:
        The pairs in the policy's tokens, and the number of pairs that were left out because chosen and
        rejected are the same, or become the same when cut to the context. The display shows that number.

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
    """Return comparisons in the policy's tokens, and the number of those that became equal when cut.

    Raises:
        DataError: none is left; the message names `source`.
    """
    pairs = [policy.model.codec.pair(row) for row in rows]
    kept = [pair for pair in pairs if not same(pair.chosen, pair.rejected)]
    if not kept:
        raise DataError(
            f"{source}: cut to the model's context, chosen and rejected are the same in every pair"
        )
    return kept, len(pairs) - len(kept)


def tell_same(run: Run, count: int) -> None:
    """Show the number of pairs that were left out because their texts are the same."""
    if count:
        run.display.say(f"left out {count} pairs in which chosen and rejected are the same")


def content_key(items: Sequence[Prompt | Record]) -> str:
    """Return a key of a set of data: of its contents, and of the columns that a reward may read."""
    return key_of([_facts(item) for item in items])


def once(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return each prompt once; two rows with the same prompt that differ in another column are two."""
    return list({content_key([prompt]): prompt for prompt in prompts}.values())


def _facts(item: Prompt | Record) -> list[Any]:
    prompt = item if isinstance(item, Prompt) else item.prompt
    texts = [] if isinstance(item, Prompt) else [c.token_ids for c in item.completions]
    margin = [item.margin] if isinstance(item, Pair) and item.margin is not None else []
    return [prompt.id, dict(prompt.columns), texts, *margin]
