"""Records from data as tokens of a learner, and keys of their content."""

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
    """Read preference pairs of a file or data set, with the configuration's `split`, `map` and `limit`.

    Returns:
        The pairs as tokens of the policy, and the number of dropped pairs, whose completions are the same or
        become the same after truncation to the context. The display shows that number.

    Raises:
        DataError: no pair is left, or the data cannot be used.
        RunError: the run started with other pairs.
    """
    rows, same = read_comparisons(source, split=cfg.split, columns=cfg.map, limit=cfg.limit)
    pairs, truncated_same = pairs_of(policy, rows, source)
    run.require_same(f"the pairs of {source}", content_key(pairs), f"the data {source!r}")
    report_same(run, same + truncated_same)
    return pairs, same + truncated_same


def pairs_of(policy: Learner, rows: Sequence[Comparison], source: str) -> tuple[list[Pair], int]:
    """Return comparisons as tokens of the policy, and the number of pairs that truncation makes equal.

    Raises:
        DataError: no pair is left; the message names `source`.
    """
    pairs = [policy.model.codec.pair(row) for row in rows]
    kept = [pair for pair in pairs if not same(pair.chosen, pair.rejected)]
    if not kept:
        raise DataError(
            f"{source}: after truncation to the model's context, chosen and rejected are the same in every "
            "pair; use shorter texts or a larger --max-length"
        )
    return kept, len(pairs) - len(kept)


def report_same(run: Run, count: int) -> None:
    """Show the number of pairs that are dropped because their texts are the same."""
    if count:
        run.display.say(f"dropped {count} pairs in which chosen and rejected are the same")


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
