from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from rich.console import Console

from palate.cli import main
from palate.cli.commands.runs import STYLES, Listed, listed, show
from palate.rundir import LOCK

MakeRun = Callable[..., Path]

SUMMARY = {
    "reward_before": 0.25, "reward_after": 0.5, "win_rate": 0.75, "win_rate_low": 0.6, "win_rate_high": 0.9,
    "kl": 3.0,
}  # fmt: skip
ACCURACY = {"accuracy_before": 0.5, "accuracy_after": 0.7, "accuracy_low": 0.4, "accuracy_high": 0.9}


@pytest.fixture
def put(describe: MakeRun, tmp_path: Path) -> MakeRun:
    """Makes runs by hand."""

    def make(
        name: str,
        state: str | None = "finished",
        *,
        summary: Any = None,
        metrics: list[dict[str, Any]] | None = None,
        started: str | None = "2026-01-02T03:04:05+0000",
        reason: str = "",
        steps: int = 10,
    ) -> Path:
        run = describe(tmp_path / name, started=started, steps=steps)
        if state is not None:
            status = {"state": state, "step": 4, "steps": steps, "reason": reason}
            status |= {"seconds": 1.5, "updated": "2026-01-02T05:06:07+0000"}
            (run / "status.json").write_text(json.dumps(status))
        if summary is not None:
            (run / "summary.json").write_text(json.dumps(summary))
        if metrics is not None:
            (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in metrics))
        return run

    return make


def names(found: list[Listed]) -> list[str]:
    return [Path(row.run).name for row in found]


def only(directory: Path) -> Listed:
    (row,) = listed(directory)
    return row


# ---- Which are listed ------------------------------------------------------------------------------


def test_runs_one_and_two_levels_down_the_newest_first(put: MakeRun, tmp_path: Path) -> None:
    put("old", started="2025-12-31T23:00:00+0000")
    put("exp/a", started="2026-01-01T00:30:00+0200")  # 22:30 of the day before in the zone of the others
    put("exp/b", started="2026-01-01T00:30:00-0200")  # 02:30
    put("exp/deep/c")
    put(".old.replaced")
    put("old/checkpoints/inside")
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [row for row in listed(tmp_path) if "loop" not in row.run]
    assert names(found) == ["b", "old", "a"]


def test_a_directory_that_is_a_run(put: MakeRun) -> None:
    assert names(listed(put("one"))) == ["one"]


# ---- What is said of one ---------------------------------------------------------------------------


def test_a_finished_run(put: MakeRun, tmp_path: Path) -> None:
    put("one", summary=SUMMARY | ACCURACY)
    row = only(tmp_path)
    assert (row.method, row.state, row.step, row.steps) == ("oaif", "finished", 4, 10)
    assert (row.started, row.updated) == ("2026-01-02T03:04:05+0000", "2026-01-02T05:06:07+0000")
    assert row.seconds == 1.5
    assert row.figures == {name: value for name, value in SUMMARY.items() if name != "kl"} | ACCURACY


@pytest.mark.parametrize(
    ("metrics", "figures"),
    [
        ([{"step": 1, "objective/scores": 0.1}, {"step": 2, "objective/scores": 0.2, "loss": 1.0}],
         {"objective/scores": 0.2}),
        ([{"step": 1, "loss": 1.0, "rewards/accuracies": 0.6}, {"step": 2, "eval_rewards/accuracies": 0.7}],
         {"eval_rewards/accuracies": 0.7}),
        ([{"step": 1, "loss": 1.0, "objective/scores": None}], {"loss": 1.0}),
        ([{"step": 1, "loss": "low"}, {"loss": True}, {"loss": 10**400}], {}),
        ([], {}),
    ],
)  # fmt: skip
@pytest.mark.parametrize("summary", [None, {"steps": 4, "win_rate": float("nan")}])
def test_a_run_without_a_result_has_its_latest_numbers(
    put: MakeRun, tmp_path: Path, summary: Any, metrics: list[dict[str, Any]], figures: dict[str, float]
) -> None:
    put("one", "interrupted", metrics=metrics, summary=summary)
    assert only(tmp_path).figures == figures


def test_a_run_that_says_it_runs(put: MakeRun, tmp_path: Path) -> None:
    run = put("one", "running")
    assert only(tmp_path).state == "killed"  # nobody holds it
    with FileLock(run / LOCK):
        assert only(tmp_path).state == "running"
    assert only(tmp_path).state == "killed"


def test_a_run_from_before_there_was_a_status(put: MakeRun, tmp_path: Path) -> None:
    put("one", None, metrics=[{"step": 7, "loss": 1.0}], started=None)
    row = only(tmp_path)
    assert (row.state, row.step, row.steps, row.updated) == ("unknown", 7, 10, None)


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("config.json", '{"method": ', "config.json' cannot be read: "),
        ("config.json", "[1]", "is not a run: it has no config.json of a run"),
        ("config.json", "\xff", "config.json' cannot be read: it is not JSON ('utf-8' codec"),
        ("config.json", "[" * 100_000, "config.json' cannot be read: "),
        ("status.json", "{", "status.json' cannot be read: "),
        ("status.json", "[]", "status.json' cannot be read: "),
        ("status.json", '{"state": "asleep"}', "has the state 'asleep'"),
        ("summary.json", "{", "summary.json' cannot be read: "),
        ("summary.json", "3", "summary.json' cannot be read: it does not contain a JSON object"),
    ],
)
def test_a_broken_run_is_unreadable_and_the_others_are_listed(
    put: MakeRun, tmp_path: Path, file: str, text: str, reason: str
) -> None:
    put("fine")
    (put("broken", started=None) / file).write_text(text, encoding="latin-1")
    rows = {Path(row.run).name: row for row in listed(tmp_path)}
    assert rows["fine"].state == "finished"
    assert rows["broken"].state == "unreadable"
    assert reason in rows["broken"].reason
    assert "\n" not in rows["broken"].reason


def test_a_directory_where_a_file_should_be(put: MakeRun, tmp_path: Path) -> None:
    (put("one") / "metrics.jsonl").mkdir()
    assert only(tmp_path).reason == f"{str(tmp_path / 'one/metrics.jsonl')!r} cannot be read: Is a directory"


def test_what_is_no_number_is_left_out(put: MakeRun, tmp_path: Path) -> None:
    put("one", started="at noon", summary={"win_rate": "high"})
    row = only(tmp_path)
    assert (row.state, row.figures) == ("finished", {})


def test_a_status_of_other_kinds_cannot_be_read(put: MakeRun, tmp_path: Path) -> None:
    status = {"state": "failed", "step": "x", "steps": None, "reason": ["a"], "seconds": "s", "updated": 3}
    (put("one") / "status.json").write_text(json.dumps(status))
    row = only(tmp_path)
    assert (row.state, row.step, row.steps, row.seconds) == ("unreadable", None, None, None)
    assert "step is 'x'" in row.reason


# ---- What is shown ---------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*flags: str) -> tuple[str, str]:
        monkeypatch.chdir(tmp_path)
        assert main(["runs", *flags]) == 0
        out, err = capsys.readouterr()
        return out, err

    return run


def test_the_table(put: MakeRun, program: Any) -> None:
    put("runs/a", summary=SUMMARY)
    put("runs/b", "failed", summary=ACCURACY, reason="it\nbroke", started="2026-01-01T00:00:00+0000")
    put("runs/c", None, metrics=[{"loss": 0.5}], started="2025-01-01T00:00:00+0000")
    out, err = program()
    assert err == ""
    assert [" ".join(line.split()) for line in out.splitlines()] == [
        "run method state step started updated result",
        "runs/a oaif finished 4/10 2026-01-02 03:04 2026-01-02 05:06 "
        "reward 0.250 -> 0.500, win rate 0.75 [0.60, 0.90]",
        "runs/b oaif failed 4/10 2026-01-01 00:00 2026-01-02 05:06 accuracy 0.500 -> 0.700 [0.40, 0.90]",
        "runs/c oaif unknown 2025-01-01 00:00 loss 0.500",
        "runs/b failed: it broke",
        "To resume a run that stopped early, repeat its command (without --overwrite).",
    ]


@pytest.mark.parametrize("state", ["interrupted", "failed", "killed"])
def test_how_a_run_goes_on_is_said_where_one_stopped(put: MakeRun, program: Any, state: str) -> None:
    put("runs/a")
    assert "To resume" not in program()[0]
    put("runs/b", state)
    assert program()[0].count("To resume") == 1


def test_a_row_is_a_line_where_the_output_is_no_terminal(put: MakeRun, program: Any) -> None:
    name = "n" * 150
    put(f"runs/{name}", summary=SUMMARY | ACCURACY)
    out, _ = program()
    assert len(out.splitlines()) == 2
    assert name in out


def test_names_and_reasons_do_nothing_to_the_terminal(put: MakeRun, program: Any) -> None:
    put("runs/\x1b[2J\u202e[red]x", "failed", reason="\x1b[31m[/b]")
    out, _ = program()
    assert not set(out) & set("\x1b\u202e")
    assert "[red]x" in out
    assert "[/b]" in out


def test_a_narrow_terminal_gets_fewer_columns_and_whole_words() -> None:
    times = {"started": "S" * 16, "updated": "U" * 16}
    row = Listed("a" * 40, "interrupted", method="oaif", step=100, steps=200, figures=SUMMARY, **times)
    for width, started in ((80, False), (119, False), (120, True)):
        out = io.StringIO()
        show([row], Console(file=out, width=width))
        assert ("S" * 16 in out.getvalue()) == started
        assert all(word in out.getvalue() for word in ("interrupted", "100/200", "U" * 16))


def test_states_have_a_word_and_a_colour() -> None:
    for state, style in STYLES.items():
        out = io.StringIO()
        console = Console(file=out, force_terminal=True, color_system="standard", width=120)
        show([Listed("one", state)], console)
        assert style != "default"
        assert f"m{state}\x1b[0m" in out.getvalue()


def test_json_is_json_alone(put: MakeRun, program: Any, tmp_path: Path) -> None:
    assert program("--json") == ("[]\n", "")
    put("runs/\udcff\u202e", summary=SUMMARY)
    (put("runs/broken", started="2020-01-01T00:00:00+0000") / "config.json").write_text("{")
    out, err = program("--json")
    assert err == ""
    assert out.isascii()
    rows = json.loads(out)
    assert {tuple(row) for row in rows} == {
        ("run", "state", "reason", "method", "step", "steps", "started", "updated", "seconds", "figures")
    }
    by_state = {row["state"]: row for row in rows}
    assert by_state["finished"]["run"] == "runs/\udcff\u202e"
    assert by_state["finished"]["figures"]["win_rate"] == 0.75
    assert by_state["unreadable"]["figures"] == {}


def test_no_runs(program: Any) -> None:
    assert program() == ("", "no runs in 'runs'\n")
    assert program(".") == ("", "no runs in '.'\n")
