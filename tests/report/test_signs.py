from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest

from palate.report import signs as module
from palate.report.signs import (
    SIGNS,
    accuracy_is_chance,
    chosen_falls,
    clipped,
    dead_pairs,
    kl_runs_away,
    length_drift,
    overfits,
    ranks_by_length,
    sampler_gap,
    signs,
    skipped_updates,
    win_rate_is_chance,
)
from palate.rundir import RunRecord, Sample

Record = Callable[..., RunRecord]
GAP = "sampling/sampling_logp_difference"


def level(look: Callable[[RunRecord], module.Sign | None], run: RunRecord) -> str | None:
    """What a sign says of a run: nothing, a note or a worry."""
    sign = look(run)
    if sign is None:
        return None
    assert look.__name__ == sign.key
    assert all((sign.title, sign.seen, sign.means, sign.do))
    return sign.level


@pytest.mark.parametrize("look", SIGNS)
def test_a_run_without_numbers_shows_nothing(record: Record, look: Any) -> None:
    assert look(record()) is None


def test_worries_come_first(record: Record) -> None:
    run = record({"completions/clipped_ratio": [0.5], "objective/kl": [40.0]})
    assert [(sign.key, sign.level) for sign in signs(run)] == [("kl_runs_away", "worry"), ("clipped", "note")]


# ---- Chosen falls ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("last", "expected"),
    # From -100 nats, 0.02 of it are 2 nats and 0.10 are 10.
    [(-90.0, None), (-101.9, None), (-102.0, "note"), (-109.9, "note"), (-110.0, "worry")],
)
def test_chosen_falls_on_held_out_pairs(record: Record, last: float, expected: str | None) -> None:
    measured = {"eval_logps/chosen": [-100.0, -95.0, last], "eval_logps/rejected": [-90.0, -95.0, -120.0]}
    run = record(measured=measured)
    assert level(chosen_falls, run) == expected
    if expected:
        seen = chosen_falls(run).seen  # type: ignore[union-attr]
        assert "held-out pairs" in seen
        assert "−100.0" in seen
        assert "−120.0" in seen


def test_chosen_falls_on_training_pairs_from_quarter_to_quarter(record: Record) -> None:
    # First quarter -100, last -110: one tenth. What lies between does not count.
    logps = [-99.0, -101.0, -500.0, 0.0, 0.0, -500.0, -111.0, -109.0]
    assert level(chosen_falls, record({"logps/chosen": logps})) == "worry"


def test_held_out_pairs_go_before_training_pairs(record: Record) -> None:
    run = record({"logps/chosen": [-100.0, -200.0]}, {"eval_logps/chosen": [-100.0, -100.0]})
    assert chosen_falls(run) is None


def test_a_policys_own_samples_are_not_looked_at(record: Record) -> None:
    run = record({"logps/chosen": [-100.0, -200.0], "objective/scores": [0.0, 1.0]})
    assert chosen_falls(run) is None


# ---- Length ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after", "expected", "word"),
    [
        (40.0, 49.9, None, ""),
        (40.0, 50.0, "note", "longer"),
        (40.0, 32.1, None, ""),
        (40.0, 32.0, "note", "shorter"),
        (40.0, 79.9, "note", "longer"),
        (40.0, 80.0, "worry", "longer"),
        (40.0, 20.0, "worry", "shorter"),
        (40.0, 0.0, None, ""),
    ],
)
def test_length_drift(record: Record, before: float, after: float, expected: str | None, word: str) -> None:
    run = record(summary={"length_before": before, "length_after": after})
    assert level(length_drift, run) == expected
    if expected:
        assert word in length_drift(run).title  # type: ignore[union-attr]


def test_length_drift_during_training(record: Record) -> None:
    assert level(length_drift, record({"completions/mean_length": [40, 40, 50, 50]})) == "note"


@pytest.mark.parametrize(
    ("after", "slope", "linked"), [(60.0, 1, True), (60.0, -1, False), (20.0, -1, True), (20.0, 1, False)]
)
def test_length_and_reward_go_together(record: Record, after: float, slope: int, linked: bool) -> None:
    # Longer texts that gain, or shorter ones that do, mean that the reward may pay for length.
    samples = [Sample("P", "B", "A", 0.0, slope * float(i), 10, 10 + i) for i in range(30)]
    sign = length_drift(record(summary={"length_before": 40.0, "length_after": after}, samples=samples))
    assert sign is not None
    assert f"correlation {'+' if slope > 0 else '−'}1.00" in sign.seen
    assert ("may pay for length" in sign.means) == linked


# ---- Cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("late", "expected"), [(0.19, None), (0.2, "note"), (0.79, "note"), (0.8, "worry"), (1.0, "worry")]
)
def test_clipped(record: Record, late: float, expected: str | None) -> None:
    # Only the last quarter counts, here the last of four steps.
    run = record(
        {"completions/clipped_ratio": [1 - late, 1 - late, 1 - late, late]}, config={"max_new_tokens": 40}
    )
    assert level(clipped, run) == expected
    if expected:
        assert "max_new_tokens (40)" in clipped(run).seen  # type: ignore[union-attr]


def test_clipped_on_held_out_prompts(record: Record) -> None:
    sign = clipped(record(summary={"eos_after": 0.7}))
    assert sign is not None
    assert "On held-out prompts, 30.0" in sign.seen
    assert clipped(record(summary={"eos_after": 0.9})) is None


# ---- Dead pairs ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tie", "expected"), [(3, None), (4, "note"), (9, "note"), (10, "worry"), (20, "worry")]
)
def test_dead_pairs(record: Record, tie: int, expected: str | None) -> None:
    run = record({"pairs/kept": [20 - tie], "pairs/dropped_tie": [tie], "pairs/dropped_identical": [0]})
    assert level(dead_pairs, run) == expected


@pytest.mark.parametrize(
    ("why", "name", "advice"),
    [
        ("tie", "ties", "--tie"),
        ("identical", "identical texts", "--temperature"),
        ("unusable", "unusable rewards", "reward"),
    ],
)
def test_dead_pairs_say_what_to_do_about_each_reason(
    record: Record, why: str, name: str, advice: str
) -> None:
    offered = {"tie": 0.0, "temperature": 1.0}
    sign = dead_pairs(record({"pairs/kept": [4, 0], f"pairs/dropped_{why}": [4, 8]}, config=offered))
    assert sign is not None
    assert sign.seen == (
        f"75.0\N{NO-BREAK SPACE}% of 16 groups gave no training pair. Reasons: {name} (12). "
        "1 of 2 steps had no pair and made no update."
    )
    assert advice in sign.do
    assert "--n" not in sign.do  # a setting that the method has not


def test_dead_pairs_of_samples_count_once(record: Record) -> None:
    # 6 of 12, whatever the number of steps; and of the second round 2 of 10: together 8 of 22.
    once = {"pairs/kept": [6.0] * 5, "pairs/dropped_tie": [6.0] * 5}
    sign = dead_pairs(record({**once, "candidates/kept": [24.0] * 5}, config={"pairing": "tournament"}))
    assert sign is not None
    assert "50.0\N{NO-BREAK SPACE}% of 12 pairs of candidates" in sign.seen
    twice = {"round": [1, 1, 2], "pairs/kept": [6, 6, 8], "pairs/dropped_tie": [6, 6, 2]}
    sign = dead_pairs(record(twice))
    assert sign is not None
    assert "36.4\N{NO-BREAK SPACE}% of 22 groups" in sign.seen


def test_two_draws_of_unlike_numbers_are_two_rounds(record: Record) -> None:
    drawn = {"pairs/kept": [6, 6, 8], "pairs/dropped_tie": [6, 6, 2], "candidates/kept": [24, 24, 20]}
    sign = dead_pairs(record(drawn))
    assert sign is not None
    assert "of 22 groups" in sign.seen


@pytest.mark.parametrize(("dropped", "expected"), [(19, None), (20, "note"), (50, "worry")])
def test_dead_pairs_of_data(record: Record, dropped: int, expected: str | None) -> None:
    run = record(summary={"pairs": 100 - dropped, "pairs_dropped": dropped})
    assert level(dead_pairs, run) == expected
    if expected:
        assert "Check the data" in dead_pairs(run).do  # type: ignore[union-attr]


# ---- KL --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        ([9.0] * 4, None),
        ([10.0] * 4, "note"),
        ([29.0] * 4, "note"),
        ([30.0] * 4, "worry"),
        ([0.0, 0.0, 3.0, 5.9], None),  # less than twice the quarter before
        ([0.0, 0.0, 3.0, 6.0], "worry"),
        ([0.0, 0.0, 0.5, 2.0], None),  # four times as much, but of next to nothing
        ([0.0, 0.0, 0.5, 2.1], "worry"),
    ],
)
def test_kl_runs_away(record: Record, kl: Sequence[float], expected: str | None) -> None:
    assert level(kl_runs_away, record({"objective/kl": kl})) == expected


def test_kl_of_the_held_out_comparison_counts_too(record: Record) -> None:
    assert level(kl_runs_away, record({"objective/kl": [5.0] * 4}, summary={"kl": 12.0})) == "note"


def test_kl_on_samples_of_an_earlier_policy_is_none(record: Record) -> None:
    assert kl_runs_away(record({"objective/kl": [40.0] * 4, "round": [1.0] * 4})) is None


def test_kl_for_nothing_is_said(record: Record) -> None:
    kl = {"objective/kl": [0.0, 2.0, 4.0, 12.0]}
    stuck = kl_runs_away(record({**kl, "objective/scores": [0.1, 0.2, 0.5, 0.4]}))
    rising = kl_runs_away(record({**kl, "objective/scores": [0.1, 0.2, 0.3, 0.4]}))
    assert stuck is not None
    assert rising is not None
    assert "reward did not rise in the last quarter (0.500, then 0.400)" in stuck.seen
    assert "did not rise" not in rising.seen


# ---- Sampler, skipped, chance, overfitting ---------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "gap", "expected"),
    [
        ("float32", 0.9e-3, None), ("float32", 1e-3, "note"), ("float32", 2e-3, "worry"),
        ("bfloat16", 0.049, None), ("bfloat16", 0.05, "note"), ("bfloat16", 0.1, "worry"),
        ("float16", 0.049, None), ("float16", 0.05, "note"),
    ],
)  # fmt: skip
def test_sampler_gap(record: Record, dtype: str, gap: float, expected: str | None) -> None:
    run = record({f"{GAP}/mean": [gap], f"{GAP}/max": [0.7]}, resolved={"dtype": dtype})
    assert level(sampler_gap, run) == expected
    if expected:
        assert dtype in sampler_gap(run).seen  # type: ignore[union-attr]
        assert "0.700" in sampler_gap(run).seen  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("counts", "expected"),
    # The metric counts up. One of 40 is 2.5 %, two are 5 %.
    [([0.0] * 40, None), ([0.0] * 30 + [1.0] * 10, "note"), ([0.0] * 30 + [1.0, 2.0] * 5, "worry")],
)
def test_skipped_updates(record: Record, counts: Sequence[float], expected: str | None) -> None:
    run = record({"skipped_updates": counts})
    assert level(skipped_updates, run) == expected
    if expected:
        assert "the first at step 31" in skipped_updates(run).seen  # type: ignore[union-attr]


CHANCE = [
    ((0.6, 0.501, 0.7), None),
    ((0.6, 0.5, 0.7), "note"),
    ((0.45, 0.4, 0.5), "note"),
    ((0.4, 0.3, 0.499), "worry"),
]


@pytest.mark.parametrize(("numbers", "expected"), CHANCE)
def test_accuracy_against_a_coin(record: Record, numbers: tuple[float, ...], expected: str | None) -> None:
    names = ("accuracy_after", "accuracy_low", "accuracy_high")
    summary: Mapping[str, float] = dict(zip(names, numbers, strict=True))
    assert level(accuracy_is_chance, record(summary=summary)) == expected
    assert (
        accuracy_is_chance(record(summary={"accuracy_after": 0.4})) is None
    )  # without an interval, no verdict


@pytest.mark.parametrize(("numbers", "expected"), CHANCE)
def test_win_rate_against_the_start(record: Record, numbers: tuple[float, ...], expected: str | None) -> None:
    names = ("win_rate", "win_rate_low", "win_rate_high")
    run = record(summary=dict(zip(names, numbers, strict=True)))
    assert level(win_rate_is_chance, run) == expected
    if expected == "worry":
        assert win_rate_is_chance(run).title == "The model got worse"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("losses", "expected"),
    [([0.7, 0.6, 0.629], None), ([0.7, 0.6, 0.631], "note"), ([0.7, 0.9], None), ([0.7, 0.6, 0.5], None)],
)
def test_overfits(record: Record, losses: Sequence[float], expected: str | None) -> None:
    run = record(measured={"eval_loss": losses})
    assert level(overfits, run) == expected
    if expected:
        assert "lowest at step 1 (0.600)" in overfits(run).seen  # type: ignore[union-attr]


def test_each_round_has_a_held_out_loss_of_its_own(record: Record) -> None:
    run = record({"round": [1, 2]}, {"eval_loss": [0.7, 0.5, 0.7]})
    assert overfits(run) is None
    assert level(overfits, record(measured={"eval_loss": [0.7, 0.5, 0.7]})) == "note"


def test_overfitting_says_what_of(record: Record) -> None:
    run = record(measured={"eval_loss": [0.7, 0.5, 0.7]}, method="sft", config={"epochs": 1.0})
    sign = overfits(run)
    assert sign is not None
    assert "its training demonstrations" in sign.means
    assert "--beta" not in sign.do


@pytest.mark.parametrize(
    ("accuracy", "longer", "shorter_high", "expected"),
    [
        (0.7, 0.6, 0.5, None),
        (0.6, 0.6, 0.5, "note"),  # no better than to prefer the longer one
        (0.45, 0.5, 0.5, None),  # length tells nothing either
        (0.7, 0.6, 0.49, "worry"),
        (0.7, 0.6, None, None),  # no such pairs
        (0.6, 0.7, None, "note"),
    ],
)
def test_ranks_by_length(
    record: Record, accuracy: float, longer: float, shorter_high: float | None, expected: str | None
) -> None:
    summary: dict[str, float] = {"accuracy_after": accuracy, "longer_wins": longer}
    if shorter_high is not None:
        summary |= {
            f"accuracy_shorter_{k}": v
            for k, v in zip(("after", "low", "high"), (0.4, 0.3, shorter_high), strict=True)
        }
    run = record(summary=summary)
    assert level(ranks_by_length, run) == expected
    if expected:
        assert ("whose chosen completion is shorter, its accuracy" in ranks_by_length(run).seen) == (
            shorter_high is not None
        )  # type: ignore[union-attr]
