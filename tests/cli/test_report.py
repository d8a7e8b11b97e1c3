from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from palate.cli import main
from palate.cli.actions import run, show_report
from palate.config import MethodConfig
from palate.errors import RunError


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Stands in for `write_report`: what it was given, or first of all what it shall raise."""
    calls: list[Any] = []

    def write_report(runs: Sequence[Path], output: Path | None = None) -> Path:
        if calls and isinstance(calls[0], Exception):
            raise calls[0]
        calls.append((list(runs), output))
        return output or runs[0] / "report.html"

    monkeypatch.setitem(sys.modules, "palate.report", SimpleNamespace(write_report=write_report))  # type: ignore[arg-type]
    monkeypatch.delitem(sys.modules, "palate.cli.report", raising=False)
    return calls


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []

    def browse(address: str) -> bool:
        found.append(address)
        return "refused" not in address

    monkeypatch.setattr("webbrowser.open", browse)
    return found


def test_the_path_is_printed(
    written: list[Any], opened: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    long = "b" * 200
    assert main(["report", "runs/a", f"runs/{long}", "--output", f"{long}.html"]) == 0
    assert written == [([Path("runs/a"), Path(f"runs/{long}")], Path(f"{long}.html"))]
    assert capsys.readouterr() == (f"{long}.html\n", "")
    assert opened == []


def test_it_is_opened(
    written: list[Any], opened: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", str(tmp_path / "a b"), "--open"]) == 0
    assert opened == [(tmp_path / "a b/report.html").as_uri()]
    assert main(["report", str(tmp_path / "refused"), "--open"]) == 2
    out, err = capsys.readouterr()
    assert "refused/report.html\n" in out
    assert err == f"palate: no browser could be started; open '{tmp_path}/refused/report.html' yourself\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("'runs/a' holds no run"), "palate: 'runs/a' holds no run\n"),
        (
            PermissionError(13, "Permission denied"),
            "palate: the report cannot be written: Permission denied\n",
        ),
    ],
)
def test_a_report_that_cannot_be_written(
    written: list[Any], capsys: pytest.CaptureFixture[str], error: Exception, message: str
) -> None:
    written.append(error)
    assert main(["report", "runs/a"]) == 2
    assert capsys.readouterr() == ("", message)


def test_a_report_at_the_end_of_a_run(written: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    show_report(Path("runs/a"), Console())
    assert written == [([Path("runs/a")], None)]
    assert capsys.readouterr() == ("report      runs/a/report.html\n", "")


def test_the_last_lines_of_a_run_cannot_move_the_cursor(
    written: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = Path("runs/\x1b[2J\u202ea")
    summary = {"checkpoint": "checkpoints/step-1"}
    done = SimpleNamespace(run=SimpleNamespace(directory=directory), summary=summary, evaluation=None)
    monkeypatch.setattr("palate.cli.actions.train", lambda *_, **__: done)
    assert run("sft", MethodConfig(model="m", data="d")) == 0
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
    assert err.startswith("palate: the run is done, but its report cannot be written: ")
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_a_bug_in_the_report_is_not_hidden(written: list[Any]) -> None:
    written.append(KeyError("ours"))
    with pytest.raises(KeyError):
        show_report(Path("runs/a"), Console())
