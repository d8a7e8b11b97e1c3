from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from palate.cli import main

ROWS = [
    {"preference": 0.9, "length": 120, "baseline_length": 100},
    {"preference": 0.5, "length": 80, "baseline_length": 100, "judge": "j"},
    {"preference": 0.2, "length": 90, "baseline_length": 95},
]


def text(rows: list[object]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_json_is_one_object_in_percent(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "verdicts.jsonl"
    file.write_text(text(ROWS))
    assert main(["evaluate", "verdicts", str(file), "--json"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["win_rate"] == pytest.approx(100 * 1.6 / 3)
    assert numbers["discrete_win_rate"] == pytest.approx(50)
    assert numbers["standard_error"] == pytest.approx(100 * (0.2466 / 2 / 3) ** 0.5, rel=0.01)
    assert 0 < numbers["length_controlled_win_rate"] < 100
    assert numbers["verdicts"] == 3


def test_a_compressed_file_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "verdicts.jsonl.gz"
    with gzip.open(file, "wt") as stream:
        stream.write(text(ROWS) + "\n")
    assert main(["evaluate", "verdicts", str(file)]) == 0
    out = capsys.readouterr().out
    assert "53.33" in out
    assert "length controlled win rate" in out


def test_a_damaged_compressed_file_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = gzip.compress("\n".join(text(ROWS) for _ in range(200)).encode())
    file = tmp_path / "verdicts.jsonl.gz"
    for place in range(10, len(whole), 7):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        assert main(["evaluate", "verdicts", str(file)]) == 2
        assert "Traceback" not in capsys.readouterr().err


def test_one_verdict_has_no_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "verdicts.jsonl"
    file.write_text(text(ROWS[:1]))
    assert main(["evaluate", "verdicts", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["standard_error"] is None


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "does not exist"),
        ("", "has no verdicts"),
        ("{", ":1 is not JSON"),
        ("[1]", ":1 is not a JSON object"),
        (text([{**ROWS[0], "preference": 1.2}]), ":1: preference is 1.2"),
        (text([*ROWS, {"preference": 1, "length": 3}]), ":4: baseline_length is missing"),
        (text([{**ROWS[0], "length": True}]), "length is True, expected a number"),
        (text([{**ROWS[0], "length": -1}]), "length is -1"),
        (text([{**ROWS[0], "length": 10**400}]), "length is out of range"),
        (text([{**ROWS[0], "preference": 10**400}]), "preference is out of range"),
        (text([{**ROWS[0], "baseline_length": 1e308}]), "baseline_length is out of range"),
        ("[" * 100_000, ":1 is not JSON"),
        ('{"preference": NaN, "length": 1, "baseline_length": 1}', "preference is nan"),
    ],
)
def test_a_mistake_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, words: str
) -> None:
    file = tmp_path / "v.jsonl"
    if content is not None:
        file.write_text(content)
    assert main(["evaluate", "verdicts", str(file)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert err.count("\n") == 1


def test_a_file_must_be_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "verdicts"]) == 2
    assert "palate evaluate verdicts FILE" in capsys.readouterr().err
