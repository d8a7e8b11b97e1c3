"""The best of several completions, by a reward or a judge, for `palate sample --best-of`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from palate.annotate.judges.ledger import Ledger
from palate.bestofn import best_of_kl, expected_best
from palate.config import RewardConfig
from palate.errors import AnnotatorError, BudgetError
from palate.journal import Journal
from palate.labelling.annotators import labeller
from palate.select import top_k
from palate.types import Group


def keep_best(
    groups: Sequence[Group], cfg: RewardConfig, options: dict[str, Any], say: Callable[[str], None]
) -> list[Group]:
    """Return each group with its best completion and its reward only.

    Also say the expected best reward for 1, 2, 4, ... completions, where rewards of prompts are comparable.

    Args:
        groups: completions of each prompt.
        cfg: the reward or the judge.
        options: options of models beside the sampled one: device and the like.
        say: shows a message to the user.

    Raises:
        AnnotatorError: no reward or judge is named, or a prompt has no completion with a usable reward.
    """
    with tempfile.TemporaryDirectory() as folder:
        journal, ledger = Journal(":memory:"), Ledger(":memory:", cfg.verdict_cache)
        try:
            label = labeller(
                cfg,
                options,
                seed=0,
                ledger=ledger,
                journal=journal,
                output=Path(folder),
                one_completion=False,
                say=say,
            )
            labels = label(groups)
        except BudgetError as error:
            reached = str(error).partition("; everything")[0]
            raise BudgetError(
                f"{reached}. `palate sample` keeps no verdicts without --verdict-cache FILE; give a higher "
                "limit"
            ) from None
        finally:
            ledger.close()
            journal.close()
    rated = [replace(g, rewards=own.rewards) for g, own in zip(groups, labels, strict=True)]
    for group in rated:
        if all(reward is None for reward in group.rewards or ()):
            raise AnnotatorError(
                f"{label.name} gave no usable reward for any completion of {group.prompt.text[:60]!r}, so "
                "none can be chosen; check the reward"
            )
    if not label.compares:
        say(gain(rated))
    return [top_k(group, 1) for group in rated]


def gain(groups: Sequence[Group]) -> str:
    """Return a line with the mean expected best reward and the KL for 1, 2, 4, ... completions."""
    rewards = [[r for r in group.rewards or () if r is not None] for group in groups]
    fewest = min(map(len, rewards))
    sizes = [2**i for i in range(int(math.log2(fewest)) + 1)]
    parts = []
    for n in sizes:
        mean = math.fsum(expected_best(own, n) for own in rewards) / len(rewards)
        parts.append(f"{n}: {mean:.3f} ({best_of_kl(n):.2f} nats)")
    return f"expected reward of the best of n, and its KL: {', '.join(parts)}"
