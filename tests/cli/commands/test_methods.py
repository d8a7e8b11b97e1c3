from __future__ import annotations

import json

import pytest

from palate.article import SOURCE
from palate.cli import main
from palate.methods import METHODS

QUESTIONS = ("no_human_preferences", "unbiased_data", "online_feedback", "no_external_api")


def test_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    rows = {row["name"]: row for row in json.loads(out)}
    assert rows.keys() == METHODS.keys()
    for row in rows.values():
        assert row.keys() == {
            "name",
            "group",
            "paper",
            "built",
            "learns_from",
            *QUESTIONS,
            "models",
            "source",
        }
        assert row["built"] is True
        assert "arXiv:" in row["paper"]
        for cells in (row, row["source"] or row):
            assert {cells[question] for question in QUESTIONS} <= {"yes", "no", "partly"}
            assert int(cells["models"][0]) > 0
    assert rows["dpo"]["source"] == {
        "no_human_preferences": "no",
        "unbiased_data": "no",
        "online_feedback": "no",
        "no_external_api": "yes",
        "models": "2 (1)",
    }
    learns_from = {name: rows[name]["learns_from"] for name in ("sft", "dpo", "oaif", "rso")}
    assert learns_from == {
        "sft": ["demonstrations"],
        "dpo": ["pairs"],
        "oaif": ["prompts"],
        "rso": ["prompts", "pairs"],
    }
    assert rows["sft"]["source"] is None
    assert {name for name, row in rows.items() if row["source"]} == SOURCE.keys() & rows.keys()


def test_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(name in out and METHODS[name].paper.split(", arXiv")[0] in out for name in METHODS)
    assert "Not implemented" not in out
    (line,) = [line for line in out.splitlines() if line.startswith("oaif ")]
    assert line.split()[1:9] == ["prompts", "yes", "yes", "yes", "no", "2", "(1)", "online"]


def test_it_fits_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["methods"]) == 0
    table = capsys.readouterr().out.split("Learns from:")[0]
    assert max(map(len, table.splitlines())) <= 80
    assert "…" not in table
