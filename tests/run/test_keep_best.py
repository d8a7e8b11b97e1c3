"""`keep: best`: the checkpoint with the best measured reward is the run's result."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import palate
from palate.errors import ConfigError
from palate.rundir import checkpoint

# Asked by peft of every network.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated")

ROWS = [{"prompt": f"question {i}"} for i in range(8)]
PAIRS = [{**row, "chosen": "yes", "rejected": "no no"} for row in ROWS]


def letters(completions: list[str], **_: object) -> list[float]:
    return [sum(map(ord, text)) / 1000 for text in completions]


def train(tiny: str, output: Path, method: str = "oaif", **changes: Any) -> palate.Outcome:
    fixed = {
        "model": tiny, "device": "cpu", "dtype": "float32", "steps": 4, "batch_size": 2, "max_new_tokens": 4,
        "data": ROWS, "reward": letters, "output": output, "lr": 0.05, "kl_every": 1, "kl_prompts": 4,
        "keep": "best", "fresh_prompts": 0, "keep_checkpoints": 1, "checkpoint_every": 1,
    }  # fmt: skip
    return palate.train(method, display=None, **{**fixed, **changes})


def rewards(run: Path) -> dict[int, float]:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["reward/fresh"] for row in rows if "reward/fresh" in row}


def test_the_result_has_the_best_reward(tiny: str, tmp_path: Path) -> None:
    done = train(tiny, tmp_path / "run")
    measured = rewards(tmp_path / "run")
    assert set(measured) == {1, 2, 3, 4}
    best = min(measured, key=lambda step: (-measured[step], step))
    assert done.summary["checkpoint"] == f"checkpoints/step-{best}"
    assert checkpoint(tmp_path / "run") == done.checkpoint
    assert done.learner.version == best
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()}
    assert kept >= {f"step-{best}", "step-4"}


def test_the_same_command_again_gives_the_same_result(tiny: str, tmp_path: Path) -> None:
    first, again = (train(tiny, tmp_path / "run") for _ in range(2))
    assert again.summary == first.summary
    assert again.learner.version == first.learner.version


def test_a_method_on_pairs_keeps_the_best_by_its_reward(tiny: str, tmp_path: Path) -> None:
    done = train(tiny, tmp_path / "run", "dpo", data=PAIRS)
    measured = rewards(tmp_path / "run")
    best = min(measured, key=lambda step: (-measured[step], step))
    assert done.summary["checkpoint"] == f"checkpoints/step-{best}"


def test_the_best_lies_within_the_bound(tiny: str, tmp_path: Path) -> None:
    bound = 0.1
    done = train(tiny, tmp_path / "run", max_kl=bound, lr=0.3)
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    kls = {row["step"]: row["kl/fresh"] for row in rows if "kl/fresh" in row}
    passed = min(step for step, kl in kls.items() if kl > bound)  # training ends there
    within = {step: reward for step, reward in rewards(tmp_path / "run").items() if step < passed}
    best = min(within, key=lambda step: (-within[step], step), default=0)
    assert done.summary["checkpoint"] == f"checkpoints/step-{best}"


def test_without_a_reward_nothing_can_be_best(tiny: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="keep is best, but no reward"):
        train(tiny, tmp_path / "run", "dpo", data=PAIRS, reward=())


def test_the_last_checkpoint_is_the_result_by_default(tiny: str, tmp_path: Path) -> None:
    done = train(tiny, tmp_path / "run", keep="last")
    assert done.summary["checkpoint"] == "checkpoints/step-4"
    assert rewards(tmp_path / "run") == {}
