"""Labelled rows in TRL's columns."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from palate.labelling.annotators import Labels
from palate.labelling.items import LABELS, PREFERS, Item
from palate.types import Content, Finish, Prompt

Status = Literal["labelled", "tie", "unusable"]
"""`tie`: both completions have the same reward. `unusable`: a reward or a verdict is missing."""

TEXTS = ("prompt", "completion", "chosen", "rejected", "finish", "chosen_finish", "rejected_finish", "tools",
         "chat_template_kwargs")  # fmt: skip


def pair_row(item: Item, labels: Labels, name: str) -> dict[str, Any]:
    """Return a row with the better completion as `chosen`; a tie keeps the data's order.

    A row without a preference has a false `label`, so that methods that learn from pairs leave it out.
    """
    status, best = verdict_on(labels.rewards)
    worst = 1 - best
    return {
        **_prompt_columns(item.prompt),
        **_answers(item, best, worst),
        **_preference(labels, best, worst, status),
        PREFERS: "chosen" if best == 0 else "rejected",
        **_costs(labels, name),
        **other_columns(item.prompt),
    }


def completion_row(item: Item, reward: float | None, labels: Labels, share: int, name: str) -> dict[str, Any]:
    """Return a row with the score of its completion.

    Args:
        item: the row of the data.
        reward: its reward.
        labels: the labels of its prompt's group.
        share: number of rows that share the cost of the group.
        name: the annotator's name.
    """
    return {
        **_prompt_columns(item.prompt),
        "completion": _plain(item.answers[0]),
        **_cut_columns({"finish": item.finishes[0]}),
        "score": reward,
        "status": "unusable" if reward is None else "labelled",
        **_costs(labels, name, share),
        **other_columns(item.prompt),
    }


def best_worst_row(items: Sequence[Item], labels: Labels, name: str) -> dict[str, Any] | None:
    """Return the pair of a prompt's best and worst completion; None if it has fewer than two rewards."""
    usable = [i for i, reward in enumerate(labels.rewards) if reward is not None]
    if len(usable) < 2:
        return None
    best = max(usable, key=lambda i: labels.rewards[i] or 0.0)
    worst = min(usable, key=lambda i: labels.rewards[i] or 0.0)
    if best == worst:
        worst = next(i for i in usable if i != best)
    status: Status = "tie" if labels.rewards[best] == labels.rewards[worst] else "labelled"
    both = Item(
        items[best].prompt,
        (items[best].answers[0], items[worst].answers[0]),
        (items[best].finishes[0], items[worst].finishes[0]),
    )
    return {
        **_prompt_columns(both.prompt),
        **_answers(both, 0, 1),
        **_preference(labels, best, worst, status),
        **_costs(labels, name),
    }


def verdict_on(rewards: Sequence[float | None]) -> tuple[Status, int]:
    """Return the status of a pair and the index of its better completion; 0 without a preference."""
    first, second = rewards
    if first is None or second is None:
        return "unusable", 0
    if first == second:
        return "tie", 0
    return "labelled", int(second > first)


def other_columns(prompt: Prompt) -> dict[str, Any]:
    """Return the row's other columns; one with the name of a column of labels or texts is renamed."""
    return {f"data_{name}" if clashes(name) else name: value for name, value in prompt.columns.items()}


def clashes(name: str) -> bool:
    """Return True for a column of the data with the name of a column that labelling writes."""
    return name in LABELS or name in TEXTS


def _preference(labels: Labels, best: int, worst: int, status: Status) -> dict[str, Any]:
    usable = status != "unusable"
    high, low = labels.rewards[best], labels.rewards[worst]
    return {
        "score_chosen": high if usable else None,
        "score_rejected": low if usable else None,
        "margin": high - low if high is not None and low is not None else None,
        "label": status == "labelled",
        "status": status,
        **_orders(labels, best, worst),
    }


def _orders(labels: Labels, best: int, worst: int) -> dict[str, float | None]:
    """Return a judge's verdicts in both orders; nothing for rewards, which have no order."""
    if not labels.shown:
        return {}
    return {
        "p_chosen_shown_first": labels.shown[best, worst, best],
        "p_chosen_shown_second": labels.shown[best, worst, worst],
    }


def _costs(labels: Labels, name: str, share: int = 1) -> dict[str, Any]:
    return {
        "judge": name,
        "judge_verdicts": labels.verdicts / share,
        "judge_tokens": labels.amount.tokens / share,
        "judge_cost": labels.amount.cost / share,
    }


def _answers(item: Item, best: int, worst: int) -> dict[str, Any]:
    finishes = {"chosen_finish": item.finishes[best], "rejected_finish": item.finishes[worst]}
    return {
        "chosen": _plain(item.answers[best]),
        "rejected": _plain(item.answers[worst]),
        **_cut_columns(finishes),
    }


def _cut_columns(finishes: Mapping[str, Finish]) -> dict[str, str]:
    """Return the finish reasons if a text was cut; without the columns, every text ended by itself."""
    return dict(finishes) if "length" in finishes.values() else {}


def _prompt_columns(prompt: Prompt) -> dict[str, Any]:
    """Return the prompt, and what the chat template reads besides it as JSON, which both formats can hold."""
    variables = dict(prompt.variables)
    columns: dict[str, Any] = {"prompt": _plain(prompt.content)}
    if tools := variables.pop("tools", None):
        columns["tools"] = json.dumps(tools, ensure_ascii=False)
    if variables:
        columns["chat_template_kwargs"] = json.dumps(variables, ensure_ascii=False)
    return columns


def _plain(content: Content) -> str | list[dict[str, Any]]:
    return content if isinstance(content, str) else [dict(turn) for turn in content]
