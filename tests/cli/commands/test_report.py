from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from palate.cli import main
from palate.errors import RunError


@pytest.fixture(autouse=True)
def any_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take every directory for a run."""
    monkeypatch.setattr("palate.cli.commands.report.read_description", lambda _: {})


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
    assert err == f"palate: no browser could be opened; open '{tmp_path}/refused/report.html' yourself\n"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (RunError("'runs/a' is not a run"), "palate: 'runs/a' is not a run\n"),
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


def test_a_wrong_directory_is_reported_first(
    written: list[Any], capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run" in capsys.readouterr().err
