"""The data of a planned run, read and tokenised as the run does, without the model's weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from palate.config import Sampling
from palate.data import read_comparisons, read_demonstrations, read_prompts
from palate.data.ranked import read_rankings
from palate.errors import DataError
from palate.launch.rows import read_rows
from palate.loops import account_of, distinct, once, tokenized
from palate.method import Method
from palate.model.codec import Codec
from palate.planning.counts import Sizes
from palate.spending import Rows
from palate.types import Example, Pair, Prompt

SECOND = {"pairs": read_comparisons, "demonstrations": read_demonstrations}
"""Fields with a second data set for training, with their readers."""

LESSONS = ("ift", "eft")
"""Fields with demonstrations before the first round, which `limit` does not shorten."""


@dataclass(frozen=True)
class PlannedData:
    """The data of a run.

    Attributes:
        prompts: prompts that leave room for a completion, from which a run samples.
        records: pairs or examples to learn from; empty for a way that learns from samples.
        sizes: the numbers of rows.
    """

    prompts: Sequence[Prompt]
    records: Sequence[Pair | Example]
    sizes: Sizes


def read_data(method: Method, cfg: Any, codec: Codec) -> PlannedData:
    """Return the data that a configuration names, in the codec's tokens.

    Raises:
        DataError: they cannot be used.
    """
    kind = method.way_of(cfg).learns_from
    records = _records(kind, cfg, codec, held_out=False)
    unseen = _records(kind, cfg, codec, held_out=True)
    sampling = isinstance(cfg, Sampling)
    if kind == "prompts":
        prompts, compared = records, len(unseen)
    else:
        prompts = [record.prompt.to_sample() for record in records]
        compared = len({record.prompt.id for record in unseen})
    fitting = [p for p in prompts if not sampling or _fits(codec, p, cfg)]
    rows = Rows(
        records=len(records),
        distinct=len(once(records)) if kind == "prompts" else len({p.id for p in prompts}),
        others=_others(cfg),
        held_out=len(unseen),
    )
    sizes = Sizes(
        rows,
        fitting=len({prompt.id for prompt in fitting}),
        held_out=compared,
        known=_count(read_comparisons, cfg, getattr(cfg, "probe_data", None), getattr(cfg, "probe_pairs", 0)),
        ranked=_ranked(cfg),
    )
    return PlannedData(fitting, () if kind == "prompts" else records, sizes)


def _records(kind: str, cfg: Any, codec: Codec, *, held_out: bool) -> list[Any]:
    """Return prompts, pairs or examples in tokens."""
    readers: dict[str, Any] = {
        "prompts": read_prompts,
        "pairs": read_comparisons,
        "demonstrations": read_demonstrations,
    }
    rows, account = read_rows(readers[kind], cfg, held_out=held_out)
    source = cfg.eval_data if held_out else cfg.data
    if not rows:
        return []
    if kind == "pairs":
        return distinct(tokenized(codec, rows, source, account, codec.pair), source, account)
    if kind == "demonstrations":
        return tokenized(codec, rows, source, account, codec.example)

    def with_room(prompt: Prompt) -> Prompt:
        codec.room(prompt, need=cfg.max_new_tokens)
        return prompt

    return tokenized(codec, rows, source, account, with_room)


def _fits(codec: Codec, prompt: Prompt, cfg: Any) -> bool:
    try:
        codec.room(prompt, need=cfg.max_new_tokens)
    except DataError:
        return False
    return True


def _others(cfg: Any) -> int:
    """Return the number of rows of further data sets for training."""
    own = sum(_count(read, cfg, getattr(cfg, name, None), cfg.limit) for name, read in SECOND.items())
    return own + sum(_count(read_demonstrations, cfg, getattr(cfg, name, None), None) for name in LESSONS)


def _count(read: Any, cfg: Any, source: str | None, limit: int | None) -> int:
    if source is None or limit == 0:
        return 0
    rows = read(source, split=cfg.split, columns=cfg.map, limit=limit, account=account_of(cfg))
    return len(rows[0] if isinstance(rows, tuple) else rows)


def _ranked(cfg: Any) -> int:
    """Return the number of answers on which a run measures its judge."""
    source = getattr(cfg, "judge_data", None)
    if source is None:
        return 0
    rankings = read_rankings(source, split=cfg.eval_split, columns=cfg.map, account=account_of(cfg))
    return sum(len(ranking.answers) for ranking in rankings)
