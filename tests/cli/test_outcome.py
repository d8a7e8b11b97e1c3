from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from palate.cli.outcome import show_outcome, show_report
from palate.errors import RunError


def test_a_report_at_the_end_of_a_run(written: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    show_report(Path("runs/a"), Console())
    assert written == [([Path("runs/a")], None)]
    assert capsys.readouterr() == ("report      runs/a/report.html\n", "")


def test_the_last_lines_of_a_run_cannot_move_the_cursor(
    written: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path("runs/\x1b[2J\u202ea")
    summary = {"checkpoint": "checkpoints/step-1"}
    done = SimpleNamespace(run=SimpleNamespace(directory=directory), summary=summary, evaluation=None)
    show_outcome(done, Console())  # type: ignore[arg-type]
    place = "runs/\ufffd[2J\ufffda"
    assert capsys.readouterr().out == (
        f"\ncheckpoint  {place}/checkpoints/step-1\nsummary     {place}/summary.json\n"
        f"report      {place}/report.html\n"
    )


@pytest.mark.parametrize("error", [RunError("no \x1b[2J room"), OSError(28, "No space left on device")])
def test_a_run_stands_without_its_report(
    written: list[Any], capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    written.append(error)
    show_report(Path("runs/a"), Console())
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("palate: the run has finished, but its report cannot be written: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_a_bug_in_the_report_is_not_hidden(written: list[Any]) -> None:
    written.append(KeyError("ours"))
    with pytest.raises(KeyError):
        show_report(Path("runs/a"), Console())
