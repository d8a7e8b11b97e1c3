from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from palate.errors import RunError
from palate.rundir import RunRecord, Sample, Status, read_run, read_runs, run_names

Write = Callable[..., Path]
Record = Callable[..., RunRecord]

STEP = {"step": 1, "loss": 0.5, "step_time": 1.0}
SAMPLE = {
    "prompt": "P", "before": "B", "after": "A", "reward_before": 0.25, "reward_after": 1.0,
    "tokens_before": 3, "tokens_after": 4, "finish_before": "eos", "finish_after": "length",
}  # fmt: skip


def test_a_whole_run(write_run: Write) -> None:
    rows = [{"step": 0, "eval_loss": 0.7}, STEP, {"step": 1, "eval_loss": 0.6}]
    run = read_run(write_run(rows=rows, samples=[SAMPLE], summary={"win_rate": 0.75}, config={"beta": 0.1}))
    assert run.method == "oaif"
    assert run.status.state == "finished"
    assert run.curve("loss") == ((1,), (0.5,))
    assert run.curve("eval_loss") == ((0, 1), (0.7, 0.6))
    assert run.figure("win_rate") == 0.75
    assert run.setting("beta") == 0.1
    assert run.samples == (Sample("P", "B", "A", 0.25, 1.0, 3, 4, "eos", "length"),)
    assert run.samples[0].gain == 0.75
    assert run.unread == {}


def test_a_run_that_has_just_begun(write_run: Write) -> None:
    run = read_run(write_run(status=Status("interrupted")))
    assert (run.rows, run.measurements, run.summary, run.samples) == ((), (), {}, ())


def test_files_that_come_late_may_be_missing(write_run: Write) -> None:
    directory = write_run()
    (directory / "metrics.jsonl").unlink()
    assert read_run(directory).rows == ()


def test_a_step_without_a_pair_is_no_measurement(write_run: Write) -> None:
    # Nothing was learnt in it, so it has no loss; it took its time all the same.
    run = read_run(write_run(rows=[{"step": 1, "pairs/kept": 0, "step_time": 1.0}]))
    assert len(run.rows) == 1
    assert run.measurements == ()


def test_null_is_not_a_number_and_is_not_drawn(write_run: Write) -> None:
    run = read_run(write_run(rows=[{**STEP, "grad_norm": math.nan}, {**STEP, "step": 2, "grad_norm": 2.0}]))
    assert math.isnan(run.rows[0]["grad_norm"])
    assert run.curve("grad_norm") == ((2,), (2.0,))


@pytest.mark.parametrize(
    "value", ["Infinity", "-Infinity", "NaN", "1e300", "1" + "0" * 400, "true", '"1"', "[1]"]
)
def test_what_is_no_number_is_not_drawn(write_run: Write, value: str) -> None:
    directory = write_run()
    (directory / "metrics.jsonl").write_text(f'{{"step": 1, "loss": {value}, "step_time": 1.0}}\n')
    assert read_run(directory).curve("loss") == ((), ())


def test_a_step_that_was_written_twice_counts_as_it_was_last(write_run: Write) -> None:
    # A run that was killed after step 2 goes on from a checkpoint of step 1.
    rows = [STEP, {**STEP, "step": 2, "loss": 9.0}, {**STEP, "step": 2, "loss": 0.4}]
    assert read_run(write_run(rows=rows)).curve("loss") == ((1, 2), (0.5, 0.4))


def test_two_measurements_after_one_step_are_both_kept(write_run: Write) -> None:
    run = read_run(write_run(rows=[{"step": 1, "eval_loss": 0.5}, {"step": 1, "eval_win_rate": 0.6}]))
    assert run.curve("eval_loss") == ((1,), (0.5,))
    assert run.curve("eval_win_rate") == ((1,), (0.6,))


def test_an_unfinished_last_line_is_left_out_and_not_counted(write_run: Write) -> None:
    directory = write_run(rows=[STEP])
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write('{"step": 2, "loss": 0.4, "note": "é'.encode()[:-1])  # cut within a letter
    run = read_run(directory)
    assert len(run.rows) == 1
    assert run.unread == {}


def test_a_last_line_without_its_end_is_read_if_it_is_whole(write_run: Write) -> None:
    directory = write_run()
    (directory / "metrics.jsonl").write_text(json.dumps(STEP))
    assert len(read_run(directory).rows) == 1


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b"null", b'"step"', b'{"loss": 1}', b'{"step": -1}', b'{"step": true}', b'{"step": "1"}',
     b"\xff",
     b"[" * 100_000, b'{"step": ' + b"1" * 5000 + b"}"],
    ids=range(11),
)  # fmt: skip
def test_broken_lines_are_left_out_and_counted(write_run: Write, line: bytes) -> None:
    directory = write_run(rows=[STEP])
    with (directory / "metrics.jsonl").open("ab") as file:
        file.write(line + b"\n\n" + json.dumps({**STEP, "step": 2}).encode() + b"\n")
    run = read_run(directory)
    assert [row["step"] for row in run.rows] == [1, 2]
    assert run.unread == {"metrics.jsonl": 1}


@pytest.mark.parametrize("change", [{"prompt": None}, {"before": 3}, {"after": ["x"]}])
def test_a_sample_without_its_texts_is_left_out_and_counted(write_run: Write, change: dict) -> None:
    run = read_run(write_run(samples=[{**SAMPLE, **change}, SAMPLE]))
    assert len(run.samples) == 1
    assert run.unread == {"samples.jsonl": 1}


@pytest.mark.parametrize("reward", [None, "high", math.nan])
def test_a_sample_without_a_reward_has_no_gain(write_run: Write, reward: object) -> None:
    (sample,) = read_run(write_run(samples=[{**SAMPLE, "reward_after": reward}])).samples
    assert sample.reward_after is None
    assert sample.gain is None


def test_figures_that_are_no_numbers_are_none(record: Record) -> None:
    run = record(summary={"kl": None, "win_rate": "0.5", "steps": True}, config={"beta": "0.1"})
    assert [run.figure(name) for name in ("kl", "win_rate", "steps", "unheard")] == [None] * 4
    assert run.setting("beta") is None


def test_samples_of_an_end_that_is_none_any_more_are_left_out(write_run: Write) -> None:
    # The run was finished, and goes on: its summary is gone, and what it then wrote is not "after".
    directory = write_run(samples=[SAMPLE], status=Status("interrupted", 5, 8))
    assert len(read_run(directory).samples) == 1
    (directory / "summary.json").unlink()
    assert read_run(directory).samples == ()


def test_steps_that_learn_from_the_same_samples(write_run: Write) -> None:
    rows = [{**STEP, "step": i, "round": 1 + i // 3, "pairs/kept": 5} for i in range(1, 6)]
    run = read_run(write_run(rows=[*rows, {"step": 5, "pairs/kept": 7}]))  # the last row is a measurement
    assert run.curve("pairs/kept") == ((1, 3, 5), (5, 5, 7))
    assert run.curve("loss")[0] == (1, 2, 3, 4, 5)
    assert not run.fresh
    assert read_run(write_run("b", rows=[{**STEP, "step": i} for i in (1, 2)])).fresh


# ---- What cannot be read ---------------------------------------------------------------------------


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name, reason in (("", "is not a run"), ("nowhere", "does not exist"), ("file", "is a file")):
        with pytest.raises(RunError, match=reason):
            read_run(tmp_path / name)


def test_a_models_directory_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(RunError, match="is not a run"):
        read_run(tmp_path)


def test_a_run_without_a_state(write_run: Write) -> None:
    directory = write_run()
    (directory / "status.json").unlink()
    with pytest.raises(RunError, match=r"no status\.json"):
        read_run(directory)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("config.json", "{"),
        ("config.json", ""),
        ("summary.json", "{"),
        ("summary.json", "[]"),
        ("summary.json", ""),
    ],
)
def test_broken_documents(write_run: Write, name: str, text: str) -> None:
    directory = write_run(summary={})
    (directory / name).write_text(text)
    with pytest.raises(RunError, match=f"{name}' cannot be read"):
        read_run(directory)


@pytest.mark.parametrize(
    ("name", "value"),
    [("state", '"gone"'), ("state", "[]"), ("step", '"3"'), ("steps", "[]"), ("seconds", '"9"'),
     ("seconds", "-1"), ("seconds", "Infinity"), ("seconds", "NaN"), ("reason", "[]"), ("updated", "{}"),
     ("unheard", "1")],
)  # fmt: skip
def test_a_status_of_wrong_types(write_run: Write, name: str, value: str) -> None:
    directory = write_run()
    known = json.loads((directory / "status.json").read_text())
    text = json.dumps({**known, name: "@"}).replace('"@"', value)
    (directory / "status.json").write_text(text)
    with pytest.raises(RunError, match=r"status\.json"):
        read_run(directory)


@pytest.mark.parametrize("text", ["[]", '"x"', "1", "null", "{"])
def test_a_status_that_is_no_object(write_run: Write, text: str) -> None:
    directory = write_run()
    (directory / "status.json").write_text(text)
    with pytest.raises(RunError, match=r"status\.json"):
        read_run(directory)


def test_summary_and_metrics_of_wrong_types_are_not_shown(write_run: Write) -> None:
    rows = [{**STEP, "step": i, "round": [1], "pairs/kept": "5", "candidates/kept": {}} for i in (1, 2)]
    run = read_run(write_run(rows=rows, summary={"loss_before": "5", "loss_after": [4], "held_out": {}}))
    assert run.curve("pairs/kept") == ((), ())
    assert len(run.draws) == 2
    assert [run.figure(name) for name in ("loss_before", "loss_after", "held_out")] == [None] * 3


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "samples.jsonl", "summary.json"])
def test_a_directory_where_a_file_should_be(write_run: Write, name: str) -> None:
    directory = write_run(summary={})
    (directory / name).unlink(missing_ok=True)
    (directory / name).mkdir()
    with pytest.raises(RunError, match=f"{name}' cannot be read: Is a directory"):
        read_run(directory)


def test_no_run_was_given() -> None:
    with pytest.raises(RunError, match="needs a run"):
        read_runs([])


def test_a_run_was_given_twice(write_run: Write) -> None:
    directory = write_run()
    (directory / "sub").mkdir()
    with pytest.raises(RunError, match="given twice"):
        read_runs([directory, directory / "sub" / ".."])


def test_a_link_to_a_run_is_that_run(write_run: Write, tmp_path: Path) -> None:
    directory = write_run()
    os.symlink(directory, tmp_path / "link")
    with pytest.raises(RunError, match="given twice"):
        read_runs([directory, tmp_path / "link"])


# ---- Names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (["/r/a"], ["a"]),
        (["/r/a", "/r/b"], ["a", "b"]),
        (["/x/a", "/y/a", "/y/b"], ["x/a", "y/a", "b"]),
        (["/x/1/a", "/y/1/a"], ["x/1/a", "y/1/a"]),
    ],
)
def test_names_tell_runs_apart(given: list[str], names: list[str]) -> None:
    assert run_names([Path(path) for path in given]) == names
