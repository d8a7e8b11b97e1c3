from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate.cli import main


@pytest.fixture
def pairs(tmp_path: Path) -> str:
    rows = [{"prompt": f"question {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(8)]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def test_a_plan_takes_the_flags_of_a_run(pairs: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--data", pairs, "--model", tiny, "--dtype", "float32", "--steps", "3", "--batch-size", "2"]
    assert main(["plan", "dpo", *words, "--pilot", "0", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["training"]["steps"] == 3
    assert plan["training"]["learned"] == 12
    assert plan["sampled"]["expected"] is None
    assert plan["memory"]["peak"] > plan["memory"]["weights"] > 0
    assert main(["plan", "dpo", *words, "--pilot", "0", "--devices", "2"]) == 0
    out = capsys.readouterr().out
    assert "at most" in out
    assert "MB if shared" in out


def test_prices_become_dollars(pairs: str, tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai")
    judge = ["--judge", "server:big@http://localhost:1/v1", "--price-in", "1", "--price-out", "2"]
    words = ["--data", pairs, "--model", tiny, "--dtype", "float32", "--max-new-tokens", "8", *judge]
    assert main(["plan", "oaif", *words, "--steps", "2", "--batch-size", "4", "--pilot", "2", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    probed = 2 * 8  # eight pairs, in both orders
    assert plan["annotating"]["questions"] == 2 * 4 * 2 + probed
    assert 0 < plan["dollars"]["expected"] < plan["dollars"]["most"]
    assert plan["seconds"]["annotating"] is None


def test_without_a_method_it_chooses(tiny: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--have", "pairs=500", "--model", tiny, "--json"]) == 0
    names = [choice["name"] for choice in json.loads(capsys.readouterr().out) if not choice["missing"]]
    assert "dpo" in names
    assert main(["plan", "--have", "pairs=500", "--model", tiny]) == 0
    assert "palate run dpo --data pairs.jsonl" in capsys.readouterr().out


def test_mistakes_end_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--have", "money"]) == 2
    assert "expected some of prompts" in capsys.readouterr().err
    assert main(["plan", "dpoo"]) == 2
    assert "dpo" in capsys.readouterr().err
