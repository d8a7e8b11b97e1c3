from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from palate.report.plots import Interval
from palate.report.tables import Figure, drawn_once, figures, held_out, interval_rows, settings, unlike
from palate.rundir import RunRecord

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
        ("Win rate", "75.0 %", "[50.0 %, 87.5 %], 100 prompts"),
        ("Mean reward", "0.750", "+0.500 from 0.250"),
        ("KL from before", "12.4", "nats per completion"),
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
        "Win rate against the model before": ("75.0 % [50.0 %, 87.5 %]", ""),
        "Accuracy": ("", "75.0 % [50.0 %, 87.5 %]"),
        "Accuracy before": ("", "50.0 %"),
        "Completions not truncated": ("25.0 % → 50.0 %", ""),
        "Prompts compared": ("100", ""),
        "Held-out pairs": ("", "200"),
    }
    assert held_out([record()]) == []


def test_figures_of_demonstrations_and_of_a_reward_model(record: Record) -> None:
    imitated = record(summary={"held_out": 12, "loss_before": 5.5, "loss_after": 4.25})
    ranker = record(
        summary={
            **RANKED, "accuracy_shorter_before": 0.5, "accuracy_shorter_after": 0.25,
            "accuracy_shorter_low": 0.125, "accuracy_shorter_high": 0.375, "shorter_pairs": 40,
            "ece_before": 0.25, "ece_after": 0.125, "longer_wins": 0.75,
        }
    )  # fmt: skip
    assert figures(imitated)[0] == ("Held-out loss", "4.25", "5.50 before")
    assert figures(ranker)[1] == ("Calibration error", "0.125", "0.250 before")
    table = {label: tuple(map(spaces, cells)) for label, cells in held_out([imitated, ranker])}
    assert table == {
        "Accuracy": ("", "75.0 % [50.0 %, 87.5 %]"),
        "Accuracy before": ("", "50.0 %"),
        "Accuracy where chosen is shorter": ("", "25.0 % [12.5 %, 37.5 %]"),
        "Accuracy where chosen is shorter, before": ("", "50.0 %"),
        "Accuracy of always preferring the longer": ("", "75.0 %"),
        "Calibration error (ECE)": ("", "0.250 → 0.125"),
        "Loss": ("5.50 → 4.25", ""),
        "Held-out pairs": ("", "200"),
        "Held-out pairs where chosen is shorter": ("", "40"),
        "Held-out demonstrations": ("12", ""),
    }
    assert interval_rows([ranker], "accuracy_shorter") == [Interval("after", 0.25, 0.125, 0.375)]


def test_samples_that_were_drawn_once(record: Record) -> None:
    drawn = {
        "candidates/kept": [8, 8],
        "completions/mean_length": [11.5, 11.5],
        "objective/scores": [0.5, 0.5],
    }
    once, other = record({**drawn, "val/contain_eos_token": [0.25, 0.25]}), record(drawn)
    assert [(label, spaces(cell)) for label, (cell,) in drawn_once([once])] == [
        ("Reward", "0.500"),
        ("Length, all", "11.5 tokens"),
        ("Ended and truncated, ended", "25.0 %"),
    ]
    assert drawn_once([other, once])[-1][1] == ("", "25.0\N{NO-BREAK SPACE}%")
    assert drawn_once([record({"objective/scores": [0.5, 0.5]})]) == []


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


def test_the_use_of_the_data_is_a_table(record: Record) -> None:
    account = {
        "rows": 5,
        "used": 3,
        "tokens": {"median": 9, "longest": 12},
        "skipped": {"rejected is missing": 1},
        "dropped": {"the same": {"rows": 1, "first": "a.jsonl:2"}},
        "unused": {"column 'x'": {"rows": 5, "first": ""}},
        "notes": {},
    }
    one, other = record(), record()
    described = replace(one, description={**one.description, "data": {"a.jsonl": account}})
    assert [title for title, _ in settings([one])] == ["configuration", "versions and machine"]
    tables = dict(settings([described, other]))
    assert tables["data"] == [
        ("a.jsonl: rows read", True, ("5", "")),
        ("a.jsonl: rows used", True, ("3", "")),
        ("a.jsonl: tokens per row", True, ("median: 9; longest: 12", "")),
        ("a.jsonl: rows skipped", True, ("rejected is missing: 1", "")),
        ("a.jsonl: rows left out", True, ("the same (rows: 1, first a.jsonl:2)", "")),
        ("a.jsonl: not used", True, ("column 'x' (rows: 5)", "")),
    ]
    assert not any("data" in name for name, _, _ in tables["versions and machine"])
    for damaged in ("x", ["x"], {"a": "x"}, {"a": {"rows": None, "skipped": {}}}):
        odd = replace(one, description={**one.description, "data": damaged})
        assert "data" not in dict(settings([odd]))
