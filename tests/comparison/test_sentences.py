from __future__ import annotations

from palate.comparison.results import BASE, sentences
from palate.effects import Difference


def test_clear_differences_come_first_and_unclear_ones_are_named() -> None:
    found = [
        Difference(BASE, "oaif", -0.31, -0.44, -0.18, 0.0005, 0.001),
        Difference("oaif", "dpo", 0.05, -0.1, 0.2, 0.4, 0.4),
    ]
    lines = sentences(found, "mean reward")
    assert lines[0] == (
        "oaif has a higher mean reward than the model before training: the difference is 0.31 [0.18, 0.44] "
        "(adjusted p 0.001)."
    )
    assert lines[1] == "These data do not separate: oaif and dpo."
    assert "other seeds and other prompts" in lines[2]


def test_one_seed_is_said() -> None:
    lines = sentences([Difference("a", "b", 1.0, 0.5, 1.5, 0.001, 0.001, seeds=False)], "mean reward")
    assert "with one seed per method, a difference may be the seed's" in lines[-1]
    assert sentences([], "x") == []


def test_one_comparison_needs_no_correction() -> None:
    assert "Holm" not in " ".join(sentences([Difference("a", "b", 1, 0.5, 1.5, 0.001, 0.001)], "x"))


def test_many_clear_differences_are_grouped_by_the_better_method() -> None:
    found = [Difference("best", f"m{i}", 0.5, 0.3, 0.7, 1e-5, 1e-4) for i in range(5)]
    found += [Difference(f"m{i}", "good", -0.2, -0.3, -0.1, 1e-3, 0.01) for i in range(3)]
    lines = sentences(found, "mean reward")
    assert lines[0].startswith("best has a clearly higher mean reward than m0 by 0.5 [0.3, 0.7], m1 by")
    assert lines[1].startswith("good has a clearly higher mean reward than m0 by 0.2 [0.1, 0.3]")
    assert sum("higher" in line for line in lines) == 2
