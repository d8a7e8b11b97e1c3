from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from filelock import FileLock

from palate.config import RunConfig
from palate.errors import RunError
from palate.run import Run
from palate.run.status import write_json, write_status
from palate.rundir import LOCK, Status, is_held, read_status


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


def run_of(directory: Path) -> Run:
    return Run(RunConfig(output=directory), method="toy")


def end(directory: Path, error: BaseException | None = None) -> None:
    """A run of three steps that ends in its second one."""
    with run_of(directory) as run:
        for step in run.steps(3):
            if step == 1 and error is not None:
                raise error
            run.log(step)


# ---- What a run says -------------------------------------------------------------------------------


def test_while_it_runs(directory: Path) -> None:
    with run_of(directory) as run:
        seen = [read_status(directory)]
        for step in run.steps(3):
            seen.append(read_status(directory))
            run.log(step)
    assert [status.state for status in seen] == ["running"] * 4
    assert [(status.step, status.steps) for status in seen] == [(0, 0), (0, 3), (1, 3), (2, 3)]
    after = read_status(directory)
    assert (after.state, after.step, after.steps, after.reason) == ("finished", 3, 3, "")
    assert after.updated.startswith("20")


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (KeyboardInterrupt(), "interrupted", ""),
        (RunError("no pair to learn from"), "failed", "no pair to learn from"),
        (ZeroDivisionError(), "failed", "ZeroDivisionError"),
    ],
)
def test_how_it_ended(directory: Path, error: BaseException, state: str, reason: str) -> None:
    with pytest.raises(type(error)):
        end(directory, error)
    found = read_status(directory)
    assert (found.state, found.reason, found.step, found.steps) == (state, reason, 1, 3)
    with run_of(directory) as run:
        assert (read_status(directory).state, read_status(directory).reason) == (state, reason)
        list(run.steps(0))  # from here on it does something
        assert (read_status(directory).state, read_status(directory).reason) == ("running", "")
    assert read_status(directory).state == "finished"


def test_seconds_are_those_of_all_starts(directory: Path) -> None:
    end(directory)
    write_status(directory, Status("failed", seconds=500.0))
    end(directory)
    assert 500 <= read_status(directory).seconds < 560


@pytest.fixture
def child(directory: Path) -> Iterator[int]:
    """A process that is in the first step of a run."""
    told, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        with run_of(directory) as run:
            for _ in run.steps(3):
                os.write(tell, b"!")
                signal.pause()
    os.read(told, 1)
    yield pid
    os.close(told)
    os.close(tell)


def test_a_run_that_was_killed_has_said_nothing(directory: Path, child: int) -> None:
    assert is_held(directory)
    assert read_status(directory).state == "running"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert json.loads((directory / "status.json").read_text())["state"] == "running"
    assert read_status(directory).state == "killed"
    assert not is_held(directory)
    end(directory)
    assert read_status(directory).state == "finished"


def test_looking_at_a_run_does_not_hold_it(directory: Path) -> None:
    # Whoever watches a run asks all the time, also at the moment at which it starts again.
    end(directory)
    looking = FileLock(directory / LOCK, thread_local=False)
    looking.acquire()
    threading.Timer(0.2, looking.release).start()
    end(directory)
    assert read_status(directory).state == "finished"


def test_a_run_without_a_lock_is_held_by_nobody(directory: Path) -> None:
    end(directory)
    write_status(directory, Status("running", step=2))
    (directory / LOCK).unlink(missing_ok=True)
    found = read_status(directory)
    assert (found.state, found.step) == ("killed", 2)
    assert not (directory / LOCK).exists()  # looking leaves nothing


# ---- What cannot be read ---------------------------------------------------------------------------


def test_a_directory_without_a_run(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(RunError, match=r"' is not a run: it has no status\.json"):
            read_status(place)


@pytest.mark.parametrize(
    "text",
    [b"", b"{", b"[]", b"null", b"3", b"\xff", b"{}", b'{"state": "running", "mood": 1}', b'{"step": 3}'],
    ids=repr,
)
def test_a_status_that_is_garbage(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "status.json").write_bytes(text)
    with pytest.raises(RunError, match=r"status\.json' cannot be read: "):
        read_status(tmp_path)


@pytest.mark.parametrize("state", ["asleep", "", None, [], 3])
def test_an_unknown_state(tmp_path: Path, state: object) -> None:
    (tmp_path / "status.json").write_text(json.dumps({"state": state}))
    with pytest.raises(RunError, match=r"has the state .*; expected one of \('running', "):
        read_status(tmp_path)


def test_a_status_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "status.json").mkdir()
    with pytest.raises(RunError, match=r"cannot be read: .*Is a directory"):
        read_status(tmp_path)


# ---- Writing ---------------------------------------------------------------------------------------


def test_a_status_comes_back(tmp_path: Path) -> None:
    status = Status("failed", 3, 9, "naïve: 'no'", 12.5, "2026-01-01T00:00:00+0100")
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status
    assert [path.name for path in tmp_path.iterdir()] == ["status.json"]


def test_a_file_is_whole_or_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"a": "naïve"})
    with pytest.raises(TypeError):
        write_json(path, {"a": 1, "b": object()})

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_json(path, {"a": 2})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": "naïve"}
