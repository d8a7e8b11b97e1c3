"""Upper bounds of spending; that runs keep within them is tested with the plan."""

from __future__ import annotations

from typing import Any

import pytest

from palate.methods import METHODS
from palate.spending import Annotations, Rows, Spending, drawn, learnt

ROWS = Rows(records=100, distinct=90, others=7, held_out=10)


def spent(name: str, **options: Any) -> Spending:
    method = METHODS[name]
    cfg = method.configure({"data": "rows.jsonl", **options})
    spends = method.way_of(cfg).spends
    assert spends is not None
    return spends(cfg, ROWS)


def test_every_way_declares_its_spending() -> None:
    assert [(name, way.variants) for name, m in METHODS.items() for way in m.ways if way.spends is None] == []


def test_questions_to_a_judge_are_all_pairs_in_both_orders() -> None:
    assert Annotations(groups=3, size=4).compared == 3 * 6 * 2
    assert Annotations(groups=3, size=4).scored == 12
    assert Annotations(groups=3, size=1).compared == 0


def test_parts_add_up() -> None:
    both = drawn(5, 4) + learnt(3, 8, 2, referenced=11)
    assert both == Spending(5, 20, (Annotations(5, 4),), 3, 48, 11)
    assert drawn(5, 4, size=0) == Spending(5, 20)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("dpo", {"batch_size": 16}, Spending(0, 0, (), 7, 7 * 16 * 2, 200)),
        ("oaif", {"steps": 5, "batch_size": 8, "n": 3}, Spending(40, 120, (Annotations(40, 3),), 5, 80, 80)),
        # 90 prompts, 7 matches in a tournament of 8; the anchor is a third text.
        ("slic-hf", {"batch_size": 9}, Spending(90, 720, (Annotations(90, 8),), 70, 70 * 9 * 3, 0)),
        (
            "slic-hf",
            {"ask": "comparisons", "anchor": "none", "steps": 2},
            Spending(90, 720, (Annotations(630, 2),), 2, 2 * 16 * 2, 0),
        ),
        # The pool of a round has the best of each earlier round: 20, then 40.
        (
            "rft",
            {"rounds": 2, "prompts_per_round": 20, "n": 4, "batch_size": 10},
            Spending(40, 160, (Annotations(20, 4), Annotations(20, 4)), 2 + 4, 60, 0),
        ),
        # Pairs of 100, then of 200, since a round also learns from the previous round.
        (
            "spin",
            {"rounds": 2, "epochs": 1, "batch_size": 10},
            Spending(220, 220, (), 30, 600, 2 * (110 + 210)),
        ),
        (
            "rlhf",
            {"steps": 3, "batch_size": 4, "ppo_epochs": 2, "mini_batches": 2, "centre_on": "none"},
            Spending(12, 12, (Annotations(12, 1),), 12, 24, 12),
        ),
        (
            "rlhf",  # 50 completions give the mean reward at the start
            {"steps": 3, "batch_size": 4, "ppo_epochs": 2, "mini_batches": 2, "centre_prompts": 50},
            Spending(62, 62, (Annotations(50, 1), Annotations(12, 1)), 12, 24, 12, early=50),
        ),
        (
            "rlhf",  # no mean reward at the start
            {"steps": 3, "batch_size": 4, "estimator": "rloo"},
            Spending(12, 48, (Annotations(12, 4),), 3, 48, 48),
        ),
    ],
)
def test_bounds_by_hand(name: str, options: dict[str, Any], expected: Spending) -> None:
    assert spent(name, **options) == expected


@pytest.mark.parametrize("name", sorted(METHODS))
def test_more_data_or_steps_never_cost_less(name: str) -> None:
    method = METHODS[name]
    for way in method.ways:
        options = {"variant": way.variants[0]} if way.variants else {}
        cfg = method.configure({"data": "rows.jsonl", **options})
        assert way.spends is not None
        small, large = way.spends(cfg, ROWS), way.spends(cfg, Rows(200, 180, 14, 20))
        for field in ("prompts", "sampled", "scored", "compared", "steps", "learned", "referenced"):
            assert getattr(small, field) <= getattr(large, field)
