from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate.cli import main
from palate.errors import RunError
from palate.evaluation.export import export


@pytest.fixture
def evaluation(tmp_path: Path) -> Path:
    """The directory of a finished evaluation of one model against another."""
    here = tmp_path / "e"
    here.mkdir()
    (here / "config.json").write_text(json.dumps({"method": "evaluate", "config": {}, "versions": {}}))
    model = {"name": "runs/a", "win_rate": 0.75, "standard_error": 0.1, "wins": 1, "kl": None}
    (here / "summary.json").write_text(
        json.dumps({"models": [model], "baseline": {"name": "b", "tokens": 3.0}})
    )
    rows = [
        {
            "prompt": f"q{i}",
            "content": f"q{i}",
            "outputs": [
                {"name": "b", "text": f"old {i}", "reward": 0.0, "tokens": 2, "finish": "eos"},
                {"name": "runs/a", "text": f"né\u2028 {i}", "reward": 1.0, "tokens": 2, "finish": "eos"},
            ],
        }
        for i in range(3)
    ]
    (here / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return here


def test_alpaca_eval(evaluation: Path, tmp_path: Path) -> None:
    paths = export(evaluation, tmp_path / "out", "alpaca-eval")
    assert [path.relative_to(tmp_path / "out").as_posix() for path in paths] == [
        "b/model_outputs.json",
        "runs-a/model_outputs.json",
    ]
    rows = json.loads(paths[1].read_text(encoding="utf-8"))
    assert rows[0] == {
        "dataset": "palate",
        "instruction": "q0",
        "output": "né\u2028 0",
        "generator": "runs/a",
    }
    assert len(rows) == 3


def test_lm_eval(evaluation: Path, tmp_path: Path) -> None:
    paths = export(evaluation, tmp_path / "out", "lm-eval")
    samples, results = paths[2:]
    rows = [json.loads(line) for line in samples.read_text(encoding="utf-8").split("\n") if line]
    assert rows[2]["doc_id"] == 2
    assert rows[2]["filtered_resps"] == ["né\u2028 2"]
    numbers = json.loads(results.read_text())["results"]["palate"]
    assert numbers["win_rate,none"] == 0.75
    assert numbers["win_rate_stderr,none"] == 0.1
    assert "kl,none" not in numbers


def test_the_command_prints_the_paths(evaluation: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "export", str(evaluation)]) == 0
    assert capsys.readouterr().out.split() == [
        str(evaluation / "export" / "b" / "model_outputs.json"),
        str(evaluation / "export" / "runs-a" / "model_outputs.json"),
    ]


def test_an_unfinished_evaluation_is_refused(evaluation: Path, tmp_path: Path) -> None:
    (evaluation / "summary.json").unlink()
    with pytest.raises(RunError, match="is not finished"):
        export(evaluation, tmp_path, "alpaca-eval")


def test_a_training_run_is_refused(evaluation: Path, tmp_path: Path) -> None:
    (evaluation / "config.json").write_text(json.dumps({"method": "dpo", "config": {}, "versions": {}}))
    with pytest.raises(RunError, match="is a training run"):
        export(evaluation, tmp_path, "lm-eval")


def test_an_unknown_format_lists_the_formats(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "export", str(tmp_path), "--format", "foo"]) == 2
    assert "--format is 'foo', expected one of alpaca-eval, lm-eval" in capsys.readouterr().err


def test_sides_with_similar_names_have_their_own_folders(evaluation: Path, tmp_path: Path) -> None:
    samples = evaluation / "samples.jsonl"
    samples.write_text(samples.read_text().replace('"name": "b"', '"name": "runs-a"'))
    paths = export(evaluation, tmp_path / "out", "alpaca-eval")
    assert [path.parent.name for path in paths] == ["runs-a", "runs-a-2"]
    assert "old 0" in paths[0].read_text(encoding="utf-8")
