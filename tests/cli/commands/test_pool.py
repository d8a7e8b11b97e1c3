from __future__ import annotations

import json
from pathlib import Path

import pytest

from palate.cli import main


@pytest.fixture
def line(tiny_plain: str, tmp_path: Path) -> list[str]:
    file = tmp_path / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"q{i}"}) + "\n" for i in range(4)))
    small = ["--n", "2", "--max-new-tokens", "4", "--device", "cpu", "--dtype", "float32"]
    return ["pool", str(file), "--model", tiny_plain, "--output", str(tmp_path / "pool"), *small]


def test_a_pool_from_the_command_line(
    line: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--reward", "length:3"]) == 0
    out, _ = capsys.readouterr()
    assert out.startswith(f"8 completions of 4 prompts in {tmp_path / 'pool' / 'shards'}\n")
    assert f"palate run METHOD --pool {tmp_path / 'pool'} --data DATA" in out
    assert main([*line, "--reward", "length:3", "--json"]) == 0
    counts = json.loads(capsys.readouterr().out)
    assert (counts["prompts"], counts["completions"]) == (4, 8)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            ["--method", "dpo"],
            "method is 'dpo', which reads no pool; expected click, rest, rft, rrhf, rso, slic-hf",
        ),
        (["--workers", "3"], "workers has no effect without ray; give --ray"),
        (["--reward", "lenght:3"], "did you mean `length:3`?"),
        (["--lr", "1"], "unknown flag --lr"),
    ],
)
def test_mistakes_are_one_sentence(
    line: list[str], more: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, *more]) == 2
    out, err = capsys.readouterr()
    assert message in err
    assert out == ""
    assert err.count("\n") <= 3  # the run's name and its data may come before
    assert "Traceback" not in err


def test_data_are_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool"]) == 2
    assert "write `palate pool DATA`" in capsys.readouterr().err


def test_the_help_is_plain_and_has_no_training(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["pool", "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("Usage: palate pool DATA --output DIR [OPTIONS]\n")
    for flag in (
        "--method",
        "--n",
        "--shard-size",
        "--ray",
        "--workers",
        "--reward",
        "--judge",
        "--temperature",
    ):
        assert flag in out
    for flag in ("--lora", "--eval-data", "--checkpoint-every", "--processes", "--lr"):
        assert f"{flag} " not in out


@pytest.mark.parametrize("method", ["click", "rest", "rft", "rrhf", "rso", "slic-hf"])
def test_the_methods_have_the_flag(method: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", method, "--help"]) == 0
    assert "--pool" in capsys.readouterr().out


def test_a_run_with_a_wrong_pool_ends_with_one_sentence(
    line: list[str], tiny_plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "def f(completions):\n    return [float(sum(map(ord, c))) for c in completions]\n"
    (tmp_path / "r.py").write_text(code)
    reward = f"{tmp_path / 'r.py'}:f"
    assert main([*line, "--reward", reward]) == 0
    run = ["run", "slic-hf", "--data", line[1], "--model", tiny_plain, "--output", str(tmp_path / "r")]
    run += ["--reward", reward, "--device", "cpu", "--dtype", "float32", "--max-new-tokens", "4"]
    run += ["--fresh-prompts", "0", "--pool"]
    assert main([*run, str(tmp_path / "none")]) == 2
    assert "none' is not a directory, so it holds no pool" in capsys.readouterr().err
    assert main([*run, str(tmp_path / "pool"), "--n", "2"]) == 2
    err = capsys.readouterr().err
    assert "was sampled with temperature 1, top_k 0, but here it is temperature 0.7, top_k 40" in err
    same = ["--n", "2", "--temperature", "1", "--top-k", "0"]
    assert main([*run, str(tmp_path / "pool"), *same]) == 0
    summary = json.loads((tmp_path / "r" / "summary.json").read_text())
    assert (summary["pool_completions"], summary["pool_verdicts"], summary["pool_cost"]) == (8, 8, 0.0)


def test_a_plan_says_what_the_pool_has(
    line: list[str], tiny_plain: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*line, "--reward", "length:3"]) == 0
    capsys.readouterr()
    plan = ["plan", "slic-hf", "--data", line[1], "--model", tiny_plain, "--device", "cpu"]
    plan += ["--reward", "length:3", "--dtype", "float32", "--max-new-tokens", "4", "--n", "2"]
    assert main([*plan, "--pool", str(tmp_path / "pool"), "--pilot", "0"]) == 0
    assert "it has 8 completions, sampled and scored already" in " ".join(capsys.readouterr().out.split())
