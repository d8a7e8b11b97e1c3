from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from palate.report.plots import Interval
from palate.report.read import RunRecord
from palate.report.tables import Figure, figures, held_out, interval_rows, settings, unlike

Record = Callable[..., RunRecord]

WON = {"win_rate": 0.75, "win_rate_low": 0.5, "win_rate_high": 0.875, "compared": 100}
RANKED = {
    "accuracy_before": 0.5, "accuracy_after": 0.75, "accuracy_low": 0.5, "accuracy_high": 0.875,
    "held_out_pairs": 200,
}  # fmt: skip


def spaces(text: str) -> str:
    return text.replace("\N{NO-BREAK SPACE}", " ")


def test_figures_of_a_comparison(record: Record) -> None:
    summary = {
        **WON,
        "reward_before": 0.25,
        "reward_after": 0.75,
        "kl": 12.4,
        "length_before": 36.6,
        "length_after": 38.4,
    }
    found = [Figure(*map(spaces, figure)) for figure in figures(record(summary=summary))]
    assert found == [
        ("Win rate", "75.0 %", "[50.0 %, 87.5 %] on 100 prompts"),
        ("Mean reward", "0.750", "+0.500 from 0.250"),
        ("KL to the start", "12.4", "nats per completion"),
        ("Mean length", "38.4", "tokens, 36.6 before"),
        ("Time", "1 min 01 s", "4 steps"),
    ]


def test_figures_of_pairs_and_of_nothing(record: Record) -> None:
    assert [figure.label for figure in figures(record(summary=RANKED))] == ["Held-out accuracy", "Time"]
    assert figures(record()) == ()


def test_held_out_figures_beside_each_other(record: Record) -> None:
    first = record(summary={**WON, "eos_before": 0.25, "eos_after": 0.5, "kl": None})
    second = record(summary={**RANKED, "length_before": 40})
    table = {label: tuple(map(spaces, cells)) for label, cells in held_out([first, second])}
    assert table == {
        "Win rate over the start": ("75.0 % [50.0 %, 87.5 %]", ""),
        "Pairs ranked as the data do": ("", "75.0 % [50.0 %, 87.5 %]"),
        "the same, before": ("", "50.0 %"),
        "Ended by itself": ("25.0 % → 50.0 %", ""),
        "Prompts compared": ("100", ""),
        "Held-out pairs": ("", "200"),
    }
    assert held_out([record()]) == []


def test_intervals_of_the_runs_that_have_one(record: Record) -> None:
    runs = [record(summary=WON), record(), record(summary=WON)]
    assert interval_rows(runs, "win_rate") == [
        Interval("A", 0.75, 0.5, 0.875, 0),
        Interval("C", 0.75, 0.5, 0.875, 2),
    ]
    assert interval_rows(runs[:1], "win_rate")[0].label == "after"
    assert interval_rows(runs, "accuracy") == []


def test_runs_that_were_measured_otherwise_do_not_compare(record: Record) -> None:
    one = record(summary=WON, config={"eval_data": "a", "reward": ["x"], "beta": 0.1})
    alike = record(summary=WON, config={"eval_data": "a", "reward": ["x"], "beta": 0.2})
    other = record(summary=WON, config={"eval_data": "b", "reward": ["y"], "beta": 0.1})
    unmeasured = record(config={"eval_data": "c"})
    assert unlike([one, alike, unmeasured]) == ""
    assert unlike([one, alike, other]) == "eval_data, reward"
    assert unlike([one]) == ""


def test_settings(record: Record) -> None:
    one = record(
        config={"beta": 0.1, "reward": ["x", "y"], "lora": True, "stop": [], "limit": None, "map": {"a": "b"}}
    )
    other = record(
        config={"beta": 0.2, "lora": True}, directory=Path("runs/b"), resolved={"dtype": "float32"}
    )
    (_, used), (_, places) = settings([one, other])
    assert used == [
        ("beta", True, ("0.1", "0.2")),
        ("reward", True, ("x, y", "")),
        ("lora", False, ("true", "true")),
        ("stop", False, ("", "")),
        ("limit", False, ("", "")),
        ("map", True, ('{"a": "b"}', "")),
    ]
    assert places == [
        ("directory", True, ("runs/a", "runs/b")),
        ("method", False, ("oaif", "oaif")),
        ("resolved.dtype", True, ("", "float32")),
    ]
