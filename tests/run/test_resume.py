"""A run that was cut off ends as if it had not been; what is not the same any more is told."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import palate
from palate.errors import RunError
from palate.methods import METHODS
from palate.run import Run
from palate.run.directory import RunDirectory
from palate.rundir import read_status

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

Toy = Any
Interrupt = Callable[..., None]
LORA = {"lora": True}


def config(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def chunks(directory: Path) -> dict[str, int]:
    """Keys of the chunks in a journal with the policy's version."""
    db = sqlite3.connect(directory / "journal.db")
    found = dict(db.execute("SELECT key, version FROM chunks").fetchall())
    db.close()
    return found


# ---- The same to the last bit ----------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], int]] = {
    "adapter, every step": ({**LORA, "schedule": "linear"}, 2),
    "all weights, every third": ({"checkpoint_every": 3, "weight_decay": 0.1, "warmup_steps": 2}, 4),
    "float32 copies": ({"checkpoint_every": 2, "dtype": "bfloat16", "schedule": "cosine"}, 2),
    "no copies": ({"dtype": "bfloat16", "masters": "live"}, 1),
    "now and then": ({**LORA, "dtype": "bfloat16", "checkpoint_every": None}, 3),
    "never": ({"checkpoint_every": 1000}, 3),
}


@pytest.mark.parametrize("way", WAYS)
def test_it_ends_as_if_it_had_not_been_cut_off(
    toy: Toy, interrupted: Interrupt, way: str, tmp_path: Path, same: Any, rows: Any
) -> None:
    options, at = WAYS[way]
    toy.options |= {"steps": 5, **options}
    whole, expected = toy(output=tmp_path / "whole")
    asked = len(toy.asked)
    interrupted(toy, at)
    resumed, policy = toy()
    assert same(policy, expected)
    assert rows(resumed.directory) == rows(whole.directory)
    # And nobody was asked twice about a text, whatever had to be computed again.
    assert len(toy.asked) == 2 * asked


def test_an_adapter_that_is_continued(
    toy: Toy, interrupted: Interrupt, tmp_path: Path, same: Any, rows: Any
) -> None:
    first, _ = toy(output=tmp_path / "first", steps=2, **LORA)
    toy.options |= {"model": str(first.directory / "checkpoints" / "step-2"), "steps": 3, **LORA}
    whole, expected = toy(output=tmp_path / "whole")
    assert rows(whole.directory)[0]["rewards/margins"] == 0.0  # its own reference, not the base under it
    interrupted(toy, 1)
    resumed, policy = toy()
    assert same(policy, expected)
    assert rows(resumed.directory) == rows(whole.directory)


def test_a_process_that_is_killed_at_any_moment(
    toy: Toy, dies: Callable[..., bool], tmp_path: Path, same: Any, rows: Any
) -> None:
    # One after the other, in one run: each goes on with what the one before has left.
    toy.options |= {"steps": 3, "keep_checkpoints": 1}
    whole, expected = toy(output=tmp_path / "whole")
    directory = toy.options["output"]
    deaths = 0
    for n in (1, 3, 4, 5, 6, 7, 9, 11, 14, 20, 30, 45, 60, 80):
        deaths += dies(toy, directory, n)
    _, policy = toy()
    assert deaths >= 10
    assert same(policy, expected)
    assert rows(directory) == rows(whole.directory)
    assert json.loads((directory / "summary.json").read_text()) == {"steps": 3}
    assert sorted(p.name for p in (directory / "checkpoints").iterdir()) == ["step-2", "step-3"]


def test_in_another_place(toy: Toy, interrupted: Interrupt, tmp_path: Path, same: Any, rows: Any) -> None:
    whole, expected = toy(output=tmp_path / "whole")
    interrupted(toy, 2)
    os.replace(tmp_path / "run", tmp_path / "moved")
    shutil.copytree(tmp_path / "moved", tmp_path / "copied")
    for place in ("moved", "copied"):
        resumed, policy = toy(output=tmp_path / place)
        assert same(policy, expected)
        assert rows(resumed.directory) == rows(whole.directory)
    assert not any("bit-identical" in line for line in toy.said)
    assert config(tmp_path / "moved")["id"] == config(tmp_path / "copied")["id"]


def test_a_clock_that_jumps_changes_nothing_but_times(
    toy: Toy, interrupted: Interrupt, tmp_path: Path, same: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, expected = toy(output=tmp_path / "whole", checkpoint_every=None)
    real, jumps = time.perf_counter, iter([5e4, -9e4, 0.0, 3e5] * 10_000)
    monkeypatch.setattr(time, "perf_counter", lambda: real() + next(jumps))
    monkeypatch.setattr(time, "strftime", lambda form: "1970-01-01T00:00:00+0000")
    interrupted(toy, 2, checkpoint_every=None)
    resumed, policy = toy(checkpoint_every=None)
    assert same(policy, expected)
    assert rows(resumed.directory) == rows(whole.directory)


def test_what_is_in_the_journal_is_not_sampled_again(toy: Toy, interrupted: Interrupt) -> None:
    interrupted(toy, 3, checkpoint_every=1000)
    before = chunks(toy.options["output"])
    told: list[tuple[str, int]] = []
    toy.after = lambda run, step: told.append(("step", step))
    with pytest.MonkeyPatch.context() as patch:
        real = Run.observe

        def observe(self: Run, stage: str, amount: int = 0) -> None:
            told.append((stage, amount))
            real(self, stage, amount)

        patch.setattr(Run, "observe", observe)
        toy(checkpoint_every=1000)
    assert sum(amount for stage, amount in told if stage == "sample") == 0
    assert sum(amount for stage, amount in told if stage == "learn") > 0
    assert chunks(toy.options["output"]) == before


# ---- Not the same any more -------------------------------------------------------------------------


def test_what_may_not_change_is_named_with_both_values(toy: Toy, interrupted: Interrupt) -> None:
    interrupted(toy, 1)
    before = {p: p.read_bytes() for p in toy.options["output"].rglob("*") if p.suffix in (".json", ".jsonl")}
    with pytest.raises(RunError) as caught:
        toy(prompts=3, lr=0.5, seed=1)
    told = (
        "already holds a run: lr is 0.01 there and 0.5 here, prompts is 2 there and 3 here, "
        "seed is 0 there and 1 here; use the original values to resume"
    )
    assert told in str(caught.value)
    assert "--overwrite" in str(caught.value)
    assert {path: path.read_bytes() for path in before} == before


def test_what_changes_no_numbers_may_change(
    toy: Toy, interrupted: Interrupt, tmp_path: Path, same: Any
) -> None:
    _, expected = toy(output=tmp_path / "whole")
    interrupted(toy, 1)
    _, policy = toy(checkpoint_every=2, keep_checkpoints=1, max_dead_steps=3)
    assert same(policy, expected)
    assert toy.said[-1] == "resuming after step 1"
    written = config(toy.options["output"])
    assert (written["config"]["keep_checkpoints"], written["config"]["max_dead_steps"]) == (1, 3)
    assert [entry["changes"] for entry in written["resumed"]] == [[]]


def test_what_changes_the_last_bits_is_told_and_drops_what_is_later(
    toy: Toy, interrupted: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    toy.options |= {"steps": 5, "checkpoint_every": 2}
    interrupted(toy, 3)  # saved after 2 updates; steps 3 and 4 are in the journal
    directory = toy.options["output"]
    before = chunks(directory)
    assert sorted(before.values()) == [0, 1, 2, 3]
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 7)
    interrupted(toy, 2, micro_batch_tokens=512)
    told = (
        f"resumed with changed settings, so results will not be bit-identical: "
        f"micro_batch_tokens was None and is 512; threads was "
        f"{threads} and is {threads + 7}"
    )
    assert told in toy.said
    after = chunks(directory)
    kept = {key for key, version in before.items() if version <= 2}
    assert kept <= after.keys()
    assert not (before.keys() - kept) & {key for key, version in after.items() if version <= 2}
    assert sorted(after.values()) == [0, 1, 2]
    # Told once: from now on, this is how it is.
    toy.said.clear()
    toy(micro_batch_tokens=512)
    assert not any("bit-identical" in line for line in toy.said)
    written = config(directory)
    assert [len(entry["changes"]) for entry in written["resumed"]] == [2, 0]
    assert written["machine"]["threads"] == threads + 7
    assert all(entry["at"] for entry in written["resumed"])


def test_a_change_is_not_forgotten_when_the_start_after_it_fails(
    toy: Toy, interrupted: Interrupt, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Changed, and a checkpoint is damaged: once that is mended, the later chunks still are of other bits.
    toy.options |= {"steps": 5, "checkpoint_every": 2}
    interrupted(toy, 3)
    directory = toy.options["output"]
    note = directory / "checkpoints" / "step-2" / "checkpoint.json"
    whole = note.read_text()
    note.write_text("")
    with pytest.raises(RunError, match="damaged"):
        toy(micro_batch_tokens=512)
    note.write_text(whole)
    interrupted(toy, 2, micro_batch_tokens=512)
    assert any("bit-identical" in line and "micro_batch_tokens" in line for line in toy.said)
    assert sorted(chunks(directory).values()) == [0, 1, 2]


def test_more_steps(toy: Toy, tmp_path: Path, same: Any, rows: Any) -> None:
    _, expected = toy(output=tmp_path / "whole", steps=4)
    toy(steps=2)
    resumed, policy = toy(steps=4)
    assert same(policy, expected)  # at a constant rate, the schedule does not know its length
    assert [row["step"] for row in rows(resumed.directory)] == [1, 2, 3, 4]
    assert json.loads((resumed.directory / "summary.json").read_text()) == {"steps": 4}
    assert any("steps was 2 and is 4" in line for line in toy.said)


def test_more_steps_that_are_cut_off_before_the_summary(
    toy: Toy, monkeypatch: pytest.MonkeyPatch, rows: Any
) -> None:
    # The summary of the two steps is still there, and is not the one of the four.
    toy(steps=2)
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            toy(steps=4)
    resumed, policy = toy(steps=4)
    assert policy.version == 4
    assert json.loads((resumed.directory / "summary.json").read_text()) == {"steps": 4}


def interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_fewer_steps_than_are_done_end_it_where_it_is(toy: Toy, interrupted: Interrupt, rows: Any) -> None:
    interrupted(toy, 3)
    resumed, policy = toy(steps=2)
    assert policy.version == 3
    assert toy.said[-1] == "3 of 2 steps are finished already"
    assert len(rows(resumed.directory)) == 3
    assert json.loads((resumed.directory / "summary.json").read_text()) == {"steps": 3}


def test_fewer_steps_than_were_asked_for(toy: Toy, interrupted: Interrupt, tmp_path: Path, same: Any) -> None:
    _, expected = toy(output=tmp_path / "whole", steps=3)
    interrupted(toy, 1)
    _, policy = toy(steps=3)
    assert same(policy, expected)


def test_another_method_is_named(toy: Toy, interrupted: Interrupt) -> None:
    interrupted(toy, 1)
    with pytest.raises(
        RunError, match="already holds a run: method is toy there and other here; use another --output"
    ):
        Run(toy.config(), method="other")


# ---- A whole run -----------------------------------------------------------------------------------


@pytest.fixture
def dpo(tiny: str, tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Trains on pairs and measures on others; the summary, without what a clock says."""
    for name, count in (("train", 6), ("held_out", 4)):
        pairs = [
            {"prompt": f"{name} {i}", "chosen": f"yes {i}", "rejected": f"oh {i * i}"} for i in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    fixed = {"model": tiny, "dtype": "float32", "device": "cpu", "lora": False, "fast": False, "lr": 1e-2}
    data = {"data": str(tmp_path / "train.jsonl"), "eval_data": str(tmp_path / "held_out.jsonl")}
    more = {"batch_size": 2, "steps": 4, "checkpoint_every": 1}

    def train(output: str = "run", **options: Any) -> dict[str, Any]:
        cfg = METHODS["dpo"].config.model_validate(
            {**fixed, **data, **more, "output": tmp_path / output, **options}
        )
        summary = palate.train("dpo", cfg).summary
        return {name: value for name, value in summary.items() if name != "seconds"}

    return train


def test_a_run_that_is_cut_off_after_its_last_step(
    dpo: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = dpo("whole")
    assert expected["accuracy_after"] > expected["accuracy_before"]
    with monkeypatch.context() as patch:
        patch.setattr(Run, "finish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            dpo()
    assert dpo() == expected


def test_what_was_measured_last_is_of_the_last_weights(
    dpo: Callable[..., dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Fewer steps than are done: it ends at once, and what it says is of the weights that it saves.
    expected = dpo("whole", steps=3)
    real = Run.log

    def log(run: Run, step: int, *metrics: Any, **options: Any) -> None:
        real(run, step, *metrics, **options)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Run, "log", log)
        with pytest.raises(KeyboardInterrupt):
            dpo(steps=4)
    found = dpo(steps=2)
    assert (found["steps"], found["accuracy_after"]) == (3, expected["accuracy_after"])


# ---- What is missing or damaged --------------------------------------------------------------------


def test_a_damaged_checkpoint_may_be_taken_away(
    toy: Toy, interrupted: Interrupt, tmp_path: Path, same: Any, rows: Any
) -> None:
    whole, expected = toy(output=tmp_path / "whole")
    interrupted(toy, 3)
    latest = toy.options["output"] / "checkpoints" / "step-3"
    (latest / "state.safetensors").write_bytes(b"")
    with pytest.raises(RunError, match=r"step-3' is damaged.* delete that directory to resume from the"):
        toy()
    shutil.rmtree(latest)  # as it says
    resumed, policy = toy()
    assert "resuming after step 2" in toy.said
    assert same(policy, expected)
    assert rows(resumed.directory) == rows(whole.directory)


def test_without_checkpoints_it_begins_again_and_pays_for_nothing_twice(
    toy: Toy, interrupted: Interrupt, tmp_path: Path, same: Any
) -> None:
    _, expected = toy(output=tmp_path / "whole")
    interrupted(toy, 2)
    shutil.rmtree(toy.options["output"] / "checkpoints")
    asked = len(toy.asked)
    _, policy = toy()
    assert same(policy, expected)
    assert len(toy.asked) == asked + 4  # those of the last step


@pytest.mark.parametrize("how", ["gone", "empty"])
def test_a_journal_that_is_lost_is_told(toy: Toy, interrupted: Interrupt, how: str) -> None:
    # With it go the hash of the reference, the metrics, and all that was paid for.
    interrupted(toy, 2)
    directory = toy.options["output"]
    metrics = (directory / "metrics.jsonl").read_text()
    (directory / "journal.db").unlink()
    if how == "empty":
        (directory / "journal.db").touch()
    with pytest.raises(RunError, match="journal"):
        toy()
    assert (directory / "metrics.jsonl").read_text() == metrics


def test_an_older_copy_of_the_journal_is_told(toy: Toy, interrupted: Interrupt, tmp_path: Path) -> None:
    interrupted(toy, 1)
    directory = toy.options["output"]
    shutil.copy(directory / "journal.db", tmp_path / "older.db")
    interrupted(toy, 3)
    shutil.copy(tmp_path / "older.db", directory / "journal.db")
    with pytest.raises(RunError, match="journal"):
        toy()


def test_metrics_follow_the_journal(toy: Toy, interrupted: Interrupt, rows: Any) -> None:
    interrupted(toy, 2)
    path = toy.options["output"] / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')  # a line that was cut
    resumed, _ = toy()
    assert [row["step"] for row in rows(resumed.directory)] == [1, 2, 3, 4]
    path.unlink()
    toy()
    assert [row["step"] for row in rows(resumed.directory)] == [1, 2, 3, 4]


# ---- Two at once -----------------------------------------------------------------------------------


def test_a_run_in_other_hands_is_left_alone(toy: Toy, interrupted: Interrupt, tmp_path: Path) -> None:
    interrupted(toy, 1)
    directory = toy.options["output"]
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        held = RunDirectory(directory, "toy", toy.config())
        assert held.resumed
        os.write(tell, b"!")
        time.sleep(60)
        os._exit(0)
    try:
        os.read(told, 1)
        kept = {p: p.read_bytes() for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}
        for changes in ({}, {"overwrite": True}):
            with pytest.raises(RunError, match=r"another process works on the run in .*run'; wait for it"):
                toy(**changes)
        assert read_status(directory).state == "interrupted"  # the other has not said anything yet
        assert {path: path.read_bytes() for path in kept} == kept
        assert [p.name for p in tmp_path.iterdir()] == ["run"]
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    toy()  # a lock dies with its process
    assert read_status(directory).state == "finished"


# ---- What is in it ---------------------------------------------------------------------------------

SAFE = {".json", ".jsonl", ".db", ".safetensors", ".parquet", ".txt", ".jinja", ".md"}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_nothing_in_a_run_can_be_unpickled(toy: Toy, lora: bool) -> None:
    run, _ = toy(lora=lora)
    files = [path for path in run.directory.rglob("*") if path.is_file()]
    assert {path.suffix for path in files if path.name != ".lock"} <= SAFE
    assert {"journal.db", "metrics.jsonl", "config.json", "status.json"} <= {path.name for path in files}
    for path in files:
        if path.suffix == ".safetensors":
            load_file(path)
        else:
            with pytest.raises(Exception):  # noqa: B017, PT011 - whatever it says, it does not load
                torch.load(path, weights_only=True)
