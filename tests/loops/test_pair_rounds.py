from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import palate
from palate.errors import RunError
from palate.learn import Likelihood, Policy
from palate.loops import implicit_rewards
from palate.methods import METHODS
from palate.types import Example, Group, Prompt


def test_implicit_rewards_by_hand(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    ref, prompt = policy.snapshot(), Prompt("p")
    texts = [policy.model.codec.completion(prompt, text) for text in ("yes", "no, no", "perhaps")]
    groups = [Group(prompt, tuple(texts[:2])), Group(prompt, (texts[2],))]
    # Before anything is learnt, policy and reference are one.
    assert [g.rewards for g in implicit_rewards(groups, policy=ref, ref=ref)] == [(0.0, 0.0), (0.0,)]
    policy.update([Example(prompt, texts[0])], Likelihood("sum"))
    now = policy.snapshot()
    gains = [
        float(now.logps([Example(prompt, t)]).sum() - ref.logps([Example(prompt, t)]).sum()) for t in texts
    ]
    found = implicit_rewards(groups, policy=now, ref=ref, beta=0.5)
    assert [r for g in found for r in g.rewards or ()] == pytest.approx([0.5 * g for g in gains], abs=1e-5)
    assert found[0].rewards is not None
    assert gains[0] > 0


# ---- A run that labels its own completions -----------------------------------------------------------


class Unplugged(palate.Display):
    """Ends a run after some steps."""

    def __init__(self, count: int) -> None:
        super().__init__(quiet=True)
        self.count = count

    def metrics(self, row: Any, samples: Any) -> None:
        self.count -= 1
        if self.count == 0:
            raise KeyboardInterrupt


@pytest.fixture
def run(tiny: str, tmp_path: Path) -> Callable[..., palate.Outcome]:
    """A tiny run that learns from pairs first and labels by implicit reward from then on."""
    prompts = [{"prompt": f"question {i}"} for i in range(6)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in prompts))
    pairs = [{**row, "chosen": "YES", "rejected": f"no {i}"} for i, row in enumerate(prompts)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))

    def go(method: str, name: str, display: palate.Display | None = None, **options: Any) -> palate.Outcome:
        files = {"data": str(tmp_path / "prompts.jsonl"), "pairs": str(tmp_path / "pairs.jsonl")}
        fixed = {"model": tiny, "output": tmp_path / name, "reward": "length:8", "label": "implicit"}
        small = {"max_new_tokens": 6, "batch_size": 4, "lr": 1e-2, "dtype": "float32", "device": "cpu"}
        rounds = {"rounds": 3, "steps": 2, "checkpoint_every": 1}
        cfg = METHODS[method].config.model_validate(files | fixed | small | rounds | options)
        return palate.train(method, cfg, display=display)

    return go


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("iterative-dpo", {"ref": "previous"}),
        ("iterative-dpo", {"ref": "start"}),
        ("pairwise-cringe", {"mix_pairs": True}),
    ],
)
def test_it_goes_on_where_it_was_cut_off(
    run: Callable[..., palate.Outcome], method: str, options: dict[str, Any], lora: bool
) -> None:
    whole = run(method, "whole", lora=lora, **options)
    for count in (3, 2):  # in the second round, and in the third
        with pytest.raises(KeyboardInterrupt):
            run(method, "cut", Unplugged(count), lora=lora, **options)
    resumed = run(method, "cut", lora=lora, **options)
    one, other = (o.policy.model.network.state_dict() for o in (whole, resumed))
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert whole.summary["steps"] == resumed.summary["steps"] == 6


def test_other_pairs_are_refused(run: Callable[..., palate.Outcome], tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run("iterative-dpo", "run", Unplugged(2))
    rows = (tmp_path / "pairs.jsonl").read_text().replace("YES", "NO")
    (tmp_path / "pairs.jsonl").write_text(rows)
    with pytest.raises(RunError, match=r"the data '.*pairs\.jsonl' changed since the run .* started"):
        run("iterative-dpo", "run")
