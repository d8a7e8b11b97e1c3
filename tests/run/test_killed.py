"""Processes that are killed at three fixed places; `make soak` does the same at random ones, for longer."""

from __future__ import annotations

import signal
import sqlite3
from pathlib import Path
from types import ModuleType


def test_a_run_that_is_killed_ends_as_if_it_had_not_been(soak: ModuleType, tmp_path: Path) -> None:
    command = [*soak.prepare(tmp_path, steps=4)["oaif"], "--eval-limit", "4"]
    whole = soak.Trial(tmp_path, "whole", command)
    ended = whole.start()
    assert ended.returncode == 0, ended.stderr

    trial = soak.Trial(tmp_path, "killed", command)
    # In the write of the first checkpoint, in the write of a chunk, in the update of a step.
    for kill in ("checkpoint:1:0", "journal:5:0", "learn:2:0"):
        before, noted = trial.committed(), len(trial.lines("sample"))
        ended = trial.start(kill=kill)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
        with sqlite3.connect(trial.directory / "journal.db") as db:
            assert db.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        again = [line.split()[1] for line in trial.lines("sample")[noted:]]
        assert not before.intersection(again)
    moved = trial.directory.rename(tmp_path / "elsewhere")
    trial.directory = moved
    ended = trial.start()
    assert ended.returncode == 0, ended.stderr
    assert trial.weights() == whole.weights()
