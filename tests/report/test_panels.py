from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from palate.report.panels import (
    MOST_OTHERS,
    letter,
    other_panels,
    panels,
    panels_of_one_value,
    stage_seconds,
)
from palate.rundir import RunRecord

Record = Callable[..., RunRecord]


def test_only_what_there_are_numbers_for(record: Record) -> None:
    assert panels([record()]) == []
    assert [panel.key for panel in panels([record({"loss": [0.7, 0.6]})])] == ["loss"]


def test_training_and_held_out_share_a_panel(record: Record) -> None:
    (panel,) = panels([record({"loss": [0.7, 0.6]}, {"eval_loss": [0.7, 0.65]})])
    assert [(line.label, line.measured, line.points) for line in panel.lines] == [
        ("training", False, ((1, 2), (0.7, 0.6))),
        ("held out", True, ((0, 1), (0.7, 0.65))),
    ]
    assert panel.lines[0].style != panel.lines[1].style


def test_a_lone_training_curve_needs_no_label(record: Record) -> None:
    (panel,) = panels([record({"loss": [0.7]})])
    assert panel.lines[0].label == ""
    (panel,) = panels([record(measured={"eval_loss": [0.7]})])
    assert panel.lines[0].label == "held out"


def test_several_runs_have_a_panel_for_each_curve(record: Record) -> None:
    first = record({"logps/chosen": [-1.0], "logps/rejected": [-2.0]})
    second = record({"logps/chosen": [-3.0]}, directory=Path("b"))
    chosen, rejected = panels([first, second])
    assert chosen.title == "Log-probabilities, chosen"
    assert [(line.label, line.style, line.points[1]) for line in chosen.lines] == [
        ("A", 0, (-1,)),
        ("B", 1, (-3,)),
    ]
    assert [line.label for line in rejected.lines] == ["A"]
    assert chosen.key != rejected.key


def test_a_panel_of_one_curve_keeps_its_title(record: Record) -> None:
    (panel,) = panels([record({"loss": [0.7]}), record({"loss": [0.6]})])
    assert panel.title == "Loss"


def test_the_rounds_and_the_judge_of_a_self_rewarding_run(record: Record) -> None:
    rounds = ("reward", "reward_before", "win_rate", "length", "length_before", "kl")
    judged = ("pairwise", "exact", "best", "ties", "unclear", "spearman", "kendall", "mean")
    names = [*(f"eval_round_{name}" for name in rounds), *(f"eval_judge/{name}" for name in judged)]
    run = record(measured={name: [0.25, 0.5] for name in names})
    drawn = {panel.key: [line.label for line in panel.lines] for panel in panels([run])}
    assert drawn == {
        "round_win_rate": [""],
        "round_reward": ["after", "before"],
        "round_length": ["after", "before"],
        "round_kl": [""],
        "judge_agreement": [""],
        "judge_shares": ["exact", "best", "ties", "unclear"],
        "judge_correlation": ["Spearman", "Kendall"],
        "judge_mean": [""],
    }
    assert other_panels([run]) == []


def test_the_band_is_the_standard_deviation(record: Record) -> None:
    (panel,) = panels([record({"objective/scores": [0.1, 0.2], "objective/scores_std": [0.3]})])
    assert panel.lines[0].band == ((0.3, 0.0), (0.3, 0.0))
    assert "one standard deviation" in panel.caption


def test_the_band_is_the_interval(record: Record) -> None:
    rates = {"eval_win_rate": [0.6], "eval_win_rate_low": [0.5], "eval_win_rate_high": [0.75]}
    (panel,) = panels([record(measured=rates)])
    assert panel.lines[0].band == ((pytest.approx(0.1),), (pytest.approx(0.15),))
    assert "95 % interval" in panel.caption


def test_no_band_without_its_metric_or_with_several_runs(record: Record) -> None:
    run = record({"objective/scores": [0.1]})
    assert panels([run])[0].lines[0].band is None
    wide = record({"objective/scores": [0.1], "objective/scores_std": [0.3]})
    (panel,) = panels([wide, run])
    assert panel.lines[0].band is None
    assert "band" not in panel.caption


def test_dead_pairs_are_shares_of_the_groups(record: Record) -> None:
    numbers = {
        "pairs/kept": [6, 0],
        "pairs/dropped": [2, 0],
        "pairs/dropped_tie": [2, 0],
        "pairs/dropped_identical": [0, 0],
    }
    (panel,) = panels([record(numbers)])
    (ties,) = panel.lines  # nothing was dropped for another reason
    assert (ties.label, ties.points) == ("ties", ((1,), (0.25,)))  # the second step had no groups


def test_how_far_the_training_text_is_from_the_models_own(record: Record) -> None:
    numbers = {"logps/training": [-2.0, -1.5], "logps/fresh": [-1.0, -1.1]}
    (panel,) = panels([record(numbers, {"eval_logps/training": [-2.1, -1.6]})])
    assert [(line.label, line.points[1]) for line in panel.lines] == [
        ("training texts", (-2.0, -1.5)),
        ("own samples", (-1.0, -1.1)),
        ("held out", (-2.1, -1.6)),
    ]


def test_no_panel_where_nothing_was_dropped(record: Record) -> None:
    run = record({"pairs/kept": [8], "pairs/dropped": [0], "pairs/dropped_tie": [0]})
    assert panels([run]) == []
    assert panels([run, run]) == []


def test_parts_of_the_reward(record: Record) -> None:
    (panel,) = panels([record({"objective/scores/sentiment": [0.1], "objective/scores/length:40": [0.2]})])
    assert [line.label for line in panel.lines] == ["sentiment", "length:40"]


def test_a_reward_model_has_panels_of_its_own(record: Record) -> None:
    measured = {
        "eval_accuracy": [0.5, 0.75], "eval_accuracy_low": [0.4, 0.625], "eval_accuracy_high": [0.6, 0.875],
        "eval_accuracy_shorter": [0.25, 0.5], "eval_ece": [0.2, 0.1], "eval_margin": [0.0, 1.0],
        "eval_mean_reward": [0.0, 0.5],
    }  # fmt: skip
    run = record(
        {"accuracy": [0.5, 1.0], "margin": [0.1, 0.9], "min_reward": [0, -1], "max_reward": [0, 1]}, measured
    )
    found = {panel.key: [line.label for line in panel.lines] for panel in panels([run])}
    assert found == {
        "ranked": ["training", "held out"],
        "ranked_shorter": ["held out"],
        "ranked_margin": ["training", "held out"],
        "ece": ["held out"],
        "scores": ["lower", "higher", "held out"],
    }
    assert panels([run])[0].lines[1].band == (pytest.approx((0.1, 0.125)), pytest.approx((0.1, 0.125)))
    assert other_panels([run]) == []


def test_samples_that_were_drawn_once_have_no_curve(record: Record) -> None:
    drawn = {"candidates/kept": [8, 8], "candidates/scores": [0.5, 0.5], "completions/mean_length": [9, 9]}
    run = record({**drawn, "loss": [0.7, 0.6], "logps/training": [-2, -1], "logps/fresh": [-1, -1]})
    assert [panel.key for panel in panels([run])] == ["shift", "loss"]  # beside a curve, the value stays
    assert [(panel.key, panel.lines[0].points) for panel in panels_of_one_value([run])] == [
        ("selected", ((1,), (0.5,))),
        ("length", ((1,), (9,))),
    ]
    rounds = record({**drawn, "round": [1, 2], "loss": [0.7, 0.6]})
    assert panels_of_one_value([rounds]) == []
    assert "length" in [panel.key for panel in panels([rounds])]


def test_kl_is_drawn_only_of_samples_of_the_policy_as_it_is(record: Record) -> None:
    kl = {"objective/kl": [0.0, -1.0]}
    assert [panel.key for panel in panels([record(kl)])] == ["kl"]
    assert panels([record({**kl, "round": [1, 1]})]) == []


def test_metrics_that_nobody_foresaw(record: Record) -> None:
    run = record(
        {"mystery": [1.0, 2.0], "constant": [1.0, 1.0], "loss": [0.7, 0.6], "time/sample": [1.0, 2.0]}
    )
    assert [panel.title for panel in other_panels([run])] == ["mystery"]


def test_not_too_many_of_them(record: Record) -> None:
    run = record({f"m{i}": [0.0, 1.0] for i in range(MOST_OTHERS + 5)})
    assert len(other_panels([run])) == MOST_OTHERS


@pytest.mark.parametrize(("index", "name"), [(0, "A"), (25, "Z"), (26, "AA"), (51, "AZ"), (52, "BA")])
def test_letters(index: int, name: str) -> None:
    assert letter(index) == name


def test_where_the_time_goes(record: Record) -> None:
    # Of three seconds, 1.5 are sampled and 1 is learnt.
    run = record(
        {"time/sample": [0.5, 0.5, 0.5], "time/learn": [0.5, 0.5, 0.0], "step_time": [1.0, 1.0, 1.0]}
    )
    assert stage_seconds(run) == {"sampling": 1.5, "learning": 1.0, "other": 0.5}
    assert stage_seconds(record()) == {}
