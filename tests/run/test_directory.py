from __future__ import annotations

import json
import os
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch

from palate.config import RunConfig
from palate.errors import BudgetError, ConfigError, DataError, ModelError, NonFiniteError, RunError
from palate.methods.oaif import OAIFConfig
from palate.run import Display, Run
from palate.run.directory import RunDirectory, describe, has_begun
from palate.types import Completion, Example, Prompt


def begin(directory: Path, *, method: str = "toy", **options: Any) -> Run:
    """A run that was opened and closed."""
    with Run(RunConfig(output=directory, **options), method=method) as run:
        list(run.steps(0))
        return run


def begun(directory: Path, **options: Any) -> Path:
    """The directory of a run that has logged a step."""
    with Run(RunConfig(output=directory, **options), method="toy") as run:
        run.log(0, {"loss": 1.0})
        run.finish({})
    return directory


def contents(directory: Path) -> dict[str, bytes]:
    """Every file but the lock, which whoever looks may touch."""
    files = (path for path in directory.rglob("*") if path.is_file() and path.name != ".lock")
    return {path.relative_to(directory).as_posix(): path.read_bytes() for path in files}


def described(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


# ---- What is there already -------------------------------------------------------------------------


def test_another_run_that_is_there_is_not_touched(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    files = contents(directory)
    told = r"run' already holds a run: seed is 0 there and 1 here; .* --output.* --overwrite"
    with pytest.raises(RunError, match=told):
        begin(directory, seed=1)
    assert contents(directory) == files


def test_overwrite_replaces_a_run_whole(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    old = described(directory)["id"]
    (directory / "checkpoints").mkdir()
    with Run(RunConfig(output=directory, overwrite=True), method="toy") as run:
        run.log(0, {"loss": 2.0})
    assert contents(directory).keys() == {"config.json", "journal.db", "metrics.jsonl", "status.json"}
    assert not (directory / "checkpoints").exists()
    assert len((directory / "metrics.jsonl").read_text().splitlines()) == 1
    assert described(directory)["id"] != old
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_never_began_may_be_replaced(tmp_path: Path) -> None:
    # What a typing mistake leaves, found only once the data were read.
    begin(tmp_path / "run", seed=1)
    again = begin(tmp_path / "run", seed=2)
    assert described(again.directory)["config"]["seed"] == 2
    assert "resumed" not in described(again.directory)


FOREIGN: list[dict[str, str]] = [
    {"notes.txt": "mine"},
    {".hidden": "mine"},
    {"metrics.jsonl": "{}"},
    {"config.json": "not json"},
    {"config.json": "[]"},
    # A model has a config.json too, and is the last thing that may be deleted.
    {"config.json": '{"model_type": "llama", "hidden_size": 64}', "model.safetensors": "weights"},
]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("files", FOREIGN, ids=str)
def test_a_foreign_directory_is_never_touched(tmp_path: Path, overwrite: bool, files: dict[str, str]) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    for name, text in files.items():
        (directory / name).write_text(text)
    with pytest.raises(RunError, match="mine' exists but holds no run; use another --output"):
        begin(directory, overwrite=overwrite)
    assert {path.name: path.read_text() for path in directory.iterdir()} == files


def test_a_checkpoint_as_output_is_not_deleted(tmp_path: Path, tiny: str) -> None:
    # The whole way: a real model directory.
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    with pytest.raises(RunError, match="holds no run"):
        begin(copy, overwrite=True)
    assert (copy / "model.safetensors").is_file()


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", ".config.json.part")])
def test_an_empty_directory_will_do(tmp_path: Path, left: tuple[str, ...]) -> None:
    # Or one in which a run was killed before it could say anything.
    (tmp_path / "run").mkdir()
    for name in left:
        (tmp_path / "run" / name).touch()
    assert (begin(tmp_path / "run").directory / "config.json").is_file()


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(RunError, match="holds no run"):
        begin(tmp_path / "run", overwrite=True)
    with pytest.raises(RunError, match=r"run/inside' cannot be written: Not a directory"):
        begin(tmp_path / "run" / "inside")
    assert (tmp_path / "run").read_text() == "mine"


def test_a_link_to_a_run_says_why_it_cannot_be_replaced(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with pytest.raises(RunError, match=r"link' cannot be written: .*symbolic link"):
        begin(tmp_path / "link", overwrite=True)
    assert begin(tmp_path / "link").directory.is_dir()  # going on with it is another thing


def test_a_damaged_journal_may_be_overwritten(tmp_path: Path) -> None:
    # As the message on it says.
    for begin_with in ("half", "checkpoints"):
        directory = tmp_path / begin_with
        with Run(RunConfig(output=directory), method="toy") as run:
            run.log(0)
        if begin_with == "checkpoints":
            (directory / "checkpoints").mkdir()
        (directory / "journal.db").write_bytes(b"no journal at all " * 100)
        with pytest.raises(RunError, match="start over with --overwrite"):
            begin(directory)
        assert begin(directory, overwrite=True).journal is not None


# ---- Replaced, and brought back --------------------------------------------------------------------


def test_a_replaced_run_comes_back_if_nothing_was_done_in_its_place(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    kept = contents(directory)
    with (
        pytest.raises(ZeroDivisionError),
        Run(RunConfig(output=directory, overwrite=True), method="toy"),
    ):
        _ = 1 / 0  # such as data that cannot be read
    assert contents(directory) == kept
    with Run(RunConfig(output=directory, overwrite=True), method="toy") as run:
        run.log(0, {"loss": 2.0})
    assert '"loss": 2.0' in (directory / "metrics.jsonl").read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_a_replaced_run_outlives_a_kill_before_anything_was_done(tmp_path: Path, dies: Any) -> None:
    directory = begun(tmp_path / "run")
    journal = (directory / "journal.db").read_bytes()

    def replace() -> None:
        with Run(RunConfig(output=directory, overwrite=True, seed=1), method="toy") as run:
            (directory / "now").touch()
            run.log(0)

    assert dies(replace, directory / "now", 1)  # on the point of doing something
    # Someone tries once more, and that comes to nothing either.
    with pytest.raises(ZeroDivisionError), Run(RunConfig(output=directory, overwrite=True), method="toy"):
        _ = 1 / 0
    places = [path for path in tmp_path.rglob("journal.db") if path.read_bytes() == journal]
    assert places == [directory / "journal.db"]


def test_a_run_that_cannot_begin_leaves_the_one_it_would_replace(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    cfg = OAIFConfig(data="x.jsonl", output=directory, overwrite=True, device="warp")
    with pytest.raises(ModelError, match="device"):
        Run(cfg, method="oaif")
    assert (directory / "summary.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_an_unknown_tracker_is_told_before_anything_is_replaced(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    with pytest.raises(ConfigError, match="report_to 'tensorbord' is unknown"):
        begin(directory, overwrite=True, report_to=["tensorbord"])
    assert (directory / "summary.json").is_file()


# ---- A refused run ---------------------------------------------------------------------------------


def refuse(directory: Path, error: type[BaseException] = DataError, **options: Any) -> None:
    """A run that ends with an error before it did anything."""
    with pytest.raises(error), Run(RunConfig(output=directory, **options), method="toy"):
        raise error("the data")


def test_a_refused_run_leaves_no_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "runs" / "toy")
    assert list(tmp_path.iterdir()) == []
    begun(tmp_path / "runs" / "other")
    refuse(tmp_path / "runs" / "toy")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, BudgetError])
def test_other_endings_keep_the_directory(tmp_path: Path, error: type[BaseException]) -> None:
    refuse(tmp_path / "toy", error)
    assert (tmp_path / "toy" / "status.json").is_file()


def test_a_batch_that_stopped_a_run_is_kept(tmp_path: Path) -> None:
    run = Run(RunConfig(output=tmp_path / "toy"), method="toy")
    error = NonFiniteError("the loss is nan", [Example(Prompt("Q"), Completion("a", (1,)))])
    run.__exit__(NonFiniteError, error, None)
    assert (tmp_path / "toy" / "nonfinite.jsonl").is_file()


def test_a_refused_run_removes_only_its_own(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty")
    assert (tmp_path / "empty").is_dir()  # the user's
    run = Run(RunConfig(output=tmp_path / "run"), method="toy")
    run.log(0, {"loss": 1.0})
    run.__exit__(DataError, DataError("a row of the second step"), None)
    assert (tmp_path / "run" / "metrics.jsonl").is_file()  # it has done something
    files = contents(tmp_path / "run")
    refuse(tmp_path / "run")
    assert contents(tmp_path / "run").keys() == files.keys()


# ---- Held by one -----------------------------------------------------------------------------------


def test_a_run_is_held_until_it_is_let_go_of(tmp_path: Path) -> None:
    cfg = RunConfig(output=tmp_path / "run")
    first = RunDirectory(tmp_path / "run", "toy", cfg)
    with pytest.raises(RunError, match="another process works on the run"):
        RunDirectory(tmp_path / "run", "toy", cfg)
    first.release()
    first.release()  # no harm
    second = RunDirectory(tmp_path / "run", "toy", cfg)
    assert (second.resumed, second.id) == (True, first.id)
    second.release()


@pytest.mark.parametrize("overwrite", [False, True])
def test_it_is_held_after_something_was_replaced(tmp_path: Path, overwrite: bool) -> None:
    (begun if overwrite else begin)(tmp_path / "run")
    cfg = RunConfig(output=tmp_path / "run", overwrite=overwrite, seed=1)
    held = RunDirectory(tmp_path / "run", "toy", cfg)
    with pytest.raises(RunError, match="another process works on the run"):
        RunDirectory(tmp_path / "run", "toy", cfg)
    held.release()


def test_a_run_that_could_not_go_on_is_not_held(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    (directory / "checkpoints" / "step-1").mkdir(parents=True)  # a partial one
    for _ in range(2):
        with pytest.raises(RunError, match=r"no checkpoint\.json"):
            begin(directory)
    (directory / "checkpoints" / "step-1").rmdir()
    begin(directory)


# ---- What is the same ------------------------------------------------------------------------------


def test_the_same_run_goes_on(tmp_path: Path) -> None:
    directory = begin(tmp_path / "run").directory
    was = described(directory)
    os.replace(directory, tmp_path / "moved")
    begin(tmp_path / "moved")
    now = described(tmp_path / "moved")
    assert "resumed" not in was
    assert (now["id"], now["started"]) == (was["id"], was["started"])
    assert now["config"]["output"] == str(tmp_path / "moved")
    assert [entry.keys() for entry in now["resumed"]] == [{"at", "changes"}]
    assert now["resumed"][0]["changes"] == []


def test_other_versions_and_another_processor_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun(tmp_path / "run")
    then = torch.backends.cpu.get_cpu_capability()
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    path = tmp_path / "run" / "config.json"
    written = described(tmp_path / "run")
    written["versions"]["torch"] = "0.4"
    path.write_text(json.dumps(written))
    held = RunDirectory(tmp_path / "run", "toy", RunConfig(output=tmp_path / "run"))
    held.release()
    torch_now = describe("toy", RunConfig())["versions"]["torch"]
    assert held.changes == [
        f"torch was 0.4 and is {torch_now}",
        f"instruction_set was {then} and is ABACUS",
    ]


def test_what_makes_it_another_run_is_named(tmp_path: Path) -> None:
    begun(tmp_path / "run", seed=1)
    with pytest.raises(
        RunError, match="already holds a run: method is toy there and other here; use another --output"
    ):
        begin(tmp_path / "run", method="other")
    cfg = OAIFConfig(data="x", output=tmp_path / "online", beta=0.1, device="cpu")
    with Run(cfg, method="oaif") as run:
        run.log(0)
    with pytest.raises(
        RunError,
        match=r"beta is 0\.1 there and 0\.2 here, data is 'x' there and 'y' here; use the original",
    ):
        Run(cfg.model_copy(update={"beta": 0.2, "data": "y", "steps": 3}), method="oaif")


def test_a_run_has_begun_when_something_would_be_missed(tmp_path: Path) -> None:
    directory = begin(tmp_path / "run").directory
    assert not has_begun(directory)
    (directory / "summary.json").touch()
    assert has_begun(directory)
    (directory / "summary.json").unlink()
    (directory / "checkpoints").mkdir()
    assert has_begun(directory)
    assert not has_begun(tmp_path / "nowhere")
    db = sqlite3.connect(directory / "journal.db")
    db.execute("INSERT INTO metrics (row) VALUES ('{}')")
    db.commit()
    db.close()
    (directory / "checkpoints").rmdir()
    assert has_begun(directory)


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The SQL statements of all journals."""
    executed: list[str] = []
    connect = sqlite3.connect

    def traced(*args: Any, **kwargs: Any) -> sqlite3.Connection:
        db = connect(*args, **kwargs)
        db.set_trace_callback(executed.append)
        return db

    monkeypatch.setattr(sqlite3, "connect", traced)
    return executed


def checks(statements: list[str]) -> int:
    return sum("quick_check" in statement for statement in statements)


def test_only_a_run_that_resumes_checks_its_whole_journal(tmp_path: Path, statements: list[str]) -> None:
    directory = begun(tmp_path / "run")
    statements.clear()
    assert has_begun(directory)
    with pytest.raises(RunError, match="already holds a run"):
        begin(directory, seed=1)
    assert checks(statements) == 0
    with Run(RunConfig(output=directory), method="toy"):
        assert checks(statements) == 1


def test_the_check_of_a_large_journal_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, said = begun(tmp_path / "run"), []
    display = Display()
    monkeypatch.setattr(display, "say", said.append)
    Run(RunConfig(output=directory), method="toy", display=display).__exit__(None, None, None)
    assert not any("checking" in line for line in said)
    monkeypatch.setattr("palate.run.directory.LARGE", 1)
    Run(RunConfig(output=directory), method="toy", display=display).__exit__(None, None, None)
    assert "checking the journal (0.0 GB)" in said


# ---- What a refusal leaves -------------------------------------------------------------------------


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file() and p.name != ".lock"}


def test_what_is_refused_later_changes_nothing(tmp_path: Path) -> None:
    # The model and the data are known only when they have been read, which is after the run is opened.
    with Run(RunConfig(output=tmp_path / "run"), method="toy") as run:
        run.require_same("the data", "a" * 32, "the data")
        run.log(0, {"loss": 1.0})
        run.finish({"steps": 1})
    before = files(tmp_path / "run")
    with (
        pytest.raises(RunError, match="the data changed since the run"),
        Run(RunConfig(output=tmp_path / "run", threads=torch.get_num_threads()), method="toy") as run,
    ):
        run.require_same("the data", "b" * 32, "the data")
    assert files(tmp_path / "run") == before


def test_a_config_that_is_lost_is_told(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    kept = (directory / "config.json").read_text()
    for broken in ("", "[]", '{"id": "a", "method": "toy", "config": null, "versions": {}}'):
        (directory / "config.json").write_text(broken)
        for overwrite in (False, True):
            with pytest.raises(
                RunError, match=r"the config\.json of the run in .* is missing or damaged; restore"
            ):
                begin(directory, overwrite=overwrite)
    (directory / "config.json").write_text(kept)
    begin(directory)


def test_what_an_interrupted_replacement_has_sampled_stays(tmp_path: Path) -> None:
    directory = begun(tmp_path / "run")
    old = described(directory)["id"]
    with Run(RunConfig(output=directory, overwrite=True), method="toy") as run:
        run.journal.keep_completions("chunk", 0, [Prompt("Q")], [[Completion("a", (1,))]])
    assert described(directory)["id"] != old
    assert begin(directory).directory == directory
    with pytest.raises(KeyboardInterrupt), Run(RunConfig(output=directory, overwrite=True), method="toy"):
        raise KeyboardInterrupt  # nothing was done, so the run before it comes back
    again = Run(RunConfig(output=directory), method="toy")
    assert again.journal.completions("chunk") is not None
    again.__exit__(None, None, None)


def test_a_number_that_may_only_grow(tmp_path: Path) -> None:
    class Rounds(RunConfig):
        """Of a method in rounds."""

        may_change_bits = RunConfig.may_change_bits | {"rounds"}
        may_grow = frozenset({"rounds"})
        rounds: int = 3
        """How many."""

    for rounds in (3, 4, 5):
        with Run(Rounds(output=tmp_path / "run", rounds=rounds), method="toy") as run:
            run.finish({})
    with pytest.raises(RunError, match="rounds is 5 there and 4 here"):
        Run(Rounds(output=tmp_path / "run", rounds=4), method="toy")
