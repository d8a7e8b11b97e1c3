"""The chain of `configs/chain`, from demonstrations over a reward model to a method, on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from palate.cli import main
from palate.config import ModelConfig
from palate.model import load_model

CHAIN = Path(__file__).parents[1] / "configs" / "chain"
SHORT = "--device cpu --dtype float32 --steps 2 --batch-size 2"


@pytest.fixture
def folder(tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    texts = [f"question {i}" for i in range(4)]
    rows = {
        "demonstrations": [{"prompt": t, "completion": t.upper()} for t in texts],
        "preferences": [{"prompt": t, "chosen": t.upper(), "rejected": "no"} for t in texts],
        "prompts": [{"prompt": t} for t in texts],
    }
    for name, content in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))
    return tmp_path


def weights(model: str) -> dict[str, torch.Tensor]:
    loaded = load_model(ModelConfig(model=model, device="cpu", dtype="float32", lora=False), trainable=False)
    return loaded.network.state_dict()


@pytest.mark.parametrize("lora", [True, False])
def test_each_begins_where_another_ended(folder: Path, tiny: str, lora: bool) -> None:
    options = f"{SHORT} {'--lora-rank 2' if lora else '--no-lora'} --lr 1e-2"
    first = f"run sft --config {CHAIN}/1-sft.yaml --model {tiny} --data demonstrations.jsonl {options}"
    second = f"run reward-model --config {CHAIN}/2-reward-model.yaml --data preferences.jsonl {options}"
    third = f"run rso --config {CHAIN}/3-rso.yaml --data prompts.jsonl {options} --n 4"
    third += " --accept 4 --max-new-tokens 4"
    for command in (first, second, third):
        assert main(command.split()) == 0
    rows = [json.loads(line) for line in (folder / "runs/chain/rso/metrics.jsonl").read_text().splitlines()]
    rows = [row for row in rows if "loss" in row]
    # What it starts from is its reference: the first loss is exactly log 2.
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert rows[0]["rewards/margins"] == 0
    assert "objective/scores" in rows[0]
    start, end = weights("runs/chain/sft"), weights("runs/chain/rso")
    assert start.keys() == end.keys()
    assert any(not torch.equal(start[name], end[name]) for name in start)
