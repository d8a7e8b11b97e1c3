"""The test of a judge before a run spends its budget."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from palate.launch import Outcome, probe, train
from palate.run import Display
from palate.testing import FaultyServer, judge_reply

Serve = Callable[[Callable[[str, str], float]], FaultyServer]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    monkeypatch.setenv("OPENAI_API_KEY", "k")
    with ExitStack() as stack:
        yield lambda prefer: stack.enter_context(FaultyServer(lambda body, n: judge_reply(body, prefer)))


def by_text(first: str, second: str) -> float:
    return 0.5 + 0.4 * ((first > second) - (first < second))


def first_wins(first: str, second: str) -> float:
    return 0.9


def run(tiny: str, folder: Path, server: FaultyServer, **changes: Any) -> tuple[Outcome, str]:
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": f"Q{i}"}) + "\n" for i in range(6)))
    screen = StringIO()
    fixed = {"model": tiny, "data": str(data), "output": folder / "run", "dtype": "float32", "device": "cpu",
             "lora": False, "max_new_tokens": 6, "steps": 1, "batch_size": 2, "fresh_prompts": 0,
             "judge": f"server:m@{server.url}", "probe_pairs": 4}  # fmt: skip
    outcome = train("oaif", display=Display(Console(file=screen, width=400)), **{**fixed, **changes})
    return outcome, screen.getvalue()


def first_row(outcome: Outcome) -> dict[str, Any]:
    row: dict[str, Any] = json.loads((outcome.directory / "metrics.jsonl").read_text().splitlines()[0])
    return row


def test_a_position_bias_is_reported_once(tiny: str, tmp_path: Path, serve: Serve) -> None:
    server = serve(first_wins)
    outcome, shown = run(tiny, tmp_path, server, max_dead_steps=5)
    row = first_row(outcome)
    assert (row["step"], row["judge/probe_pairs"]) == (0, 4)
    assert (row["judge/probe_orders_disagree"], row["judge/probe_first_share"]) == (1.0, 1.0)
    assert "strong position bias" in shown
    count = len(server.requests)
    assert count == outcome.summary["judge_verdicts"] == 2 * 4 + 2 * 2  # it counts
    _, again = run(tiny, tmp_path, server, max_dead_steps=5)
    assert len(server.requests) == count
    assert "position bias" not in again


def test_a_good_judge_gives_no_warning(tiny: str, tmp_path: Path, serve: Serve) -> None:
    outcome, shown = run(tiny, tmp_path, serve(by_text))
    assert first_row(outcome)["judge/probe_orders_disagree"] == 0.0
    assert "the position decides in 0%" in shown
    assert "warning: the judge" not in shown


def test_accuracy_on_given_pairs(tiny: str, tmp_path: Path, serve: Serve) -> None:
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"P{i}", "chosen": "a" if i else "z", "rejected": "b"} for i in range(4)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome, shown = run(tiny, tmp_path, serve(by_text), probe_data=str(pairs))
    assert first_row(outcome)["judge/probe_accuracy"] == 0.25
    assert "accuracy could be that of a coin" in shown


ACCURACY = {f"judge/probe_accuracy{end}": p for end, p in (("", 0.9), ("_low", 0.7), ("_high", 0.97))}


@pytest.mark.parametrize(
    ("numbers", "words"),
    [({"judge/probe_pairs": 0.0}, "completions of every prompt are the same"),
     ({"judge/probe_pairs": 4.0, "judge/probe_unusable": 1.0}, "no usable verdict on 4 pairs")],
)  # fmt: skip
def test_the_accuracy_is_shown_without_a_result_on_own_pairs(numbers: dict[str, float], words: str) -> None:
    first, second = probe._lines({**numbers, **ACCURACY})
    assert words in first
    assert second == "the judge's accuracy on the probe data: 90% [70%, 97%]"


@pytest.mark.parametrize(
    ("limit", "flag"),
    [({"max_verdicts": 79}, "8 of --max-verdicts 79"),
     ({"max_judge_tokens": 9000}, "--max-judge-tokens 9000"),
     ({"max_cost": 0.009, "price_in": 1.0, "price_out": 1.0}, "--max-cost 0.009")],
)  # fmt: skip
def test_it_uses_at_most_a_tenth_of_a_limit(
    tiny: str, tmp_path: Path, serve: Serve, limit: dict[str, Any], flag: str
) -> None:
    server = serve(by_text)
    _, shown = run(tiny, tmp_path, server, **limit)
    assert "the judge is not tested before the first step" in shown
    assert flag in shown
    assert len(server.requests) == 4  # those of the step


def test_it_changes_nothing_in_the_run(tiny: str, tmp_path: Path, serve: Serve) -> None:
    weights = []
    for count in (0, 4):
        folder = tmp_path / str(count)
        folder.mkdir()
        outcome, _ = run(tiny, folder, serve(by_text), probe_pairs=count, steps=2)
        weights.append((outcome.checkpoint / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("mode", "lines"), [("pairwise", 1), (None, 1), ("score", 0), ("rubric", 0)])
def test_several_processes_name_the_test_that_is_left_out(
    monkeypatch: pytest.MonkeyPatch, mode: str | None, lines: int
) -> None:
    said: list[str] = []
    monkeypatch.setattr(probe, "current", lambda: SimpleNamespace(size=2))
    cfg = SimpleNamespace(judge="local:m", judge_mode=mode, probe_pairs=20)
    one: Any = SimpleNamespace(display=SimpleNamespace(say=said.append))
    probe.probe_judge(None, one, [], cfg, one)
    assert len(said) == lines
