from __future__ import annotations

import itertools
import json
import pickle
from pathlib import Path
from typing import Any

import pytest

from palate.config import RunConfig
from palate.errors import NonFiniteError, RunError
from palate.run import Run
from palate.run.watch import DeadSteps, save_batch
from palate.types import Completion, Example, Group, Pair, Prompt

DEAD: dict[str, Any] = {
    "step_time": 1.0,
    "pairs/kept": 0,
    "pairs/dropped": 3,
    "pairs/dropped_tie": 2,
    "pairs/dropped_identical": 1,
}
ALIVE: dict[str, Any] = {"step_time": 1.0, "pairs/kept": 1, "pairs/dropped_tie": 2}
OFFLINE: dict[str, Any] = {"step_time": 1.0, "loss": 1.0}


def seen(most: int, rows: list[dict[str, Any]], before: list[dict[str, Any]] | None = None) -> int:
    """How many rows go by until a run is ended; all, if it is not."""
    watch = DeadSteps(most, before or [])
    for i, row in enumerate(rows):
        try:
            watch.see(row)
        except RunError:
            return i
    return len(rows)


# ---- Steps in which nothing is learnt --------------------------------------------------------------


@pytest.mark.parametrize("most", [1, 2, 5])
def test_so_many_in_a_row_end_a_run(most: int) -> None:
    assert seen(most, [DEAD] * 9) == most - 1


def test_one_that_learns_begins_the_count_anew() -> None:
    assert seen(3, [DEAD, DEAD, ALIVE] * 5) == 15
    assert seen(3, [DEAD, DEAD, ALIVE, DEAD, DEAD, DEAD]) == 5


def test_a_method_without_pairs_is_never_dead() -> None:
    assert seen(1, [OFFLINE] * 9) == 9


@pytest.mark.parametrize("before", range(4))
def test_those_before_an_interruption_count(before: int) -> None:
    history = [DEAD] * 4 + [ALIVE] + [DEAD] * before
    assert seen(4, [DEAD] * 9, history) == 3 - before


def test_the_reasons_are_named() -> None:
    with pytest.raises(RunError) as caught:
        DeadSteps(1, []).see({"step": 4, **DEAD, "pairs/dropped_unusable": 0})
    told = str(caught.value)
    assert "no pair to learn from in 1 steps in a row (in the last one: 2 tie, 1 identical)" in told
    for way_out in ("--tie", "--n", "--temperature", "--max-dead-steps"):
        assert way_out in told


def attempt(directory: Path, steps: list[dict[str, Any]], most: int, measured: tuple[int, ...] = ()) -> int:
    """Steps that a run without checkpoints logs before it is stopped."""
    run = Run(RunConfig(output=directory, max_dead_steps=most), method="toy")
    count = 0
    with run:
        for step in run.steps(len(steps)):
            count += 1
            if step in measured:
                run.measure("pairs", lambda: {"eval_loss": 0.0})
            run.log(step, steps[step])
    return count


def test_a_run_stops_and_may_be_told_to_go_on(tmp_path: Path) -> None:
    for _ in range(2):  # going on as it was comes to the same end
        with pytest.raises(RunError, match="in 3 steps in a row"):
            attempt(tmp_path / "run", [ALIVE, *[DEAD] * 5], most=3)
        written = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in written] == [1, 2, 3, 4]  # what led there can be seen
    assert attempt(tmp_path / "run", [ALIVE, *[DEAD] * 5], most=6) == 6


@pytest.mark.parametrize("cut", range(4))
def test_the_count_is_the_same_when_it_was_cut_off(toy: Any, interrupted: Any, cut: int) -> None:
    # Also where something was measured between the steps, which is no step.
    real = Run.log

    def log(run: Run, step: int, *metrics: Any, **options: Any) -> None:
        if step == 2:
            run.measure("pairs", lambda: {"eval_loss": 0.0})
        real(run, step, {"pairs/kept": int(step == 0), "pairs/dropped_tie": 2}, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "log", log)
        toy.options |= {"steps": 8, "max_dead_steps": 4}
        interrupted(toy, cut)
        with pytest.raises(RunError, match=r"in 4 steps in a row \(in the last one: 2 tie\)"):
            toy()
    written = (toy.options["output"] / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in written if "eval_loss" not in line]
    assert steps == [1, 2, 3, 4, 5]


# ---- Batches that are no numbers -------------------------------------------------------------------


def test_a_batch_is_written_completion_by_completion(tmp_path: Path) -> None:
    ids = itertools.count()

    def c(text: str) -> Completion:
        return Completion(text, (next(ids), next(ids)))

    chat = Prompt(({"role": "user", "content": "näive"},))
    records = [Pair(Prompt("P"), c("a"), c("b")), Group(chat, (c("\x00"),)), Example(Prompt("E"), c("🙂"))]
    save_batch(tmp_path / "b.jsonl", NonFiniteError("no number", records))
    rows = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text(encoding="utf-8").splitlines()]
    assert rows == [
        {"prompt": "P", "completion": "a", "token_ids": [0, 1]},
        {"prompt": "P", "completion": "b", "token_ids": [2, 3]},
        {"prompt": "näive", "completion": "\x00", "token_ids": [4, 5]},
        {"prompt": "E", "completion": "🙂", "token_ids": [6, 7]},
    ]


def test_the_error_survives_the_way_between_processes() -> None:
    records = [Example(Prompt("E"), Completion("a", (1,)))]
    error = NonFiniteError("the loss is nan", records)
    sent = pickle.loads(pickle.dumps(error))
    assert (type(sent), str(sent), sent.records) == (NonFiniteError, "the loss is nan", records)
