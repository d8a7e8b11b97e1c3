from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import palate
from palate.errors import RunError
from palate.loops import RoundsConfig, prompts_of_round, threshold
from palate.methods import METHODS
from palate.run import Run
from palate.types import Completion, Group, Prompt

# ---- Prompts ---------------------------------------------------------------------------------------


def asked(tmp_path: Path, prompts: list[Prompt], per_round: int | None, rounds: int) -> list[list[str]]:
    cfg = RoundsConfig(data="-", output=tmp_path / f"run{per_round}", prompts_per_round=per_round)
    with Run(cfg, method="rft") as run:
        return [[p.text for p in prompts_of_round(prompts, t, cfg, run)] for t in range(rounds)]


def test_a_round_goes_on_where_the_last_one_stopped(tmp_path: Path) -> None:
    prompts = [Prompt(f"q{i}") for i in range(6)]
    texts = sorted(p.text for p in prompts)
    assert asked(tmp_path, prompts, None, 2) == [texts, texts]
    thirds = asked(tmp_path, prompts, 2, 6)
    for epoch in (thirds[:3], thirds[3:]):
        assert sorted(text for part in epoch for text in part) == texts
    assert thirds[:3] != thirds[3:]
    assert sorted(asked(tmp_path, prompts, 100, 1)[0]) == texts


def test_no_prompt_is_asked_twice_in_a_round(tmp_path: Path) -> None:
    prompts = [Prompt("a"), Prompt("b"), Prompt("a")]
    assert asked(tmp_path, prompts, None, 1) == [["a", "b"]]
    for part in asked(tmp_path, [*prompts[:2], Prompt("c")], 2, 9):  # also where an epoch ends in a round
        assert len(set(part)) == len(part) > 0
    # Rows that ask the same are two where a reward or a method may read another answer in them.
    other = [Prompt("a", {"gold": "x"}), Prompt("a", {"gold": "y"}), Prompt("a", {"gold": "x"})]
    assert asked(tmp_path, other, 3, 1) == [["a", "a"]]


# ---- Going on --------------------------------------------------------------------------------------


@pytest.fixture
def run(tiny: str, tmp_path: Path) -> Callable[..., palate.Outcome]:
    """A tiny run of `rft`, always in the same directory."""
    rows = [{"prompt": f"question {i}"} for i in range(4)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def go(**options: Any) -> palate.Outcome:
        fixed = {"model": tiny, "data": str(tmp_path / "train.jsonl"), "output": tmp_path / "run", "n": 2}
        small = {"max_new_tokens": 4, "batch_size": 4, "lr": 1e-2, "dtype": "float32", "device": "cpu"}
        reward = {"reward": "length:8", "lora": False}
        return palate.train("rft", METHODS["rft"].config.model_validate(fixed | small | reward | options))

    return go


def test_rounds_may_be_added_but_not_made_longer(run: Callable[..., palate.Outcome]) -> None:
    assert run(rounds=2, steps=2).summary["steps"] == 4
    with pytest.raises(RunError, match=r"already holds a run: steps is 2 there and 3 here"):
        run(rounds=2, steps=3)
    longer = run(rounds=3, steps=2)
    assert longer.summary["steps"] == 6
    for _ in range(2):  # and are not taken back, which would leave the checkpoints of two runs
        with pytest.raises(RunError, match=r"already holds a run: rounds is 3 there and 2 here"):
            run(rounds=2, steps=2)
    assert run(rounds=3, steps=2).summary["steps"] == 6
    rows = [json.loads(line) for line in (longer.run.directory / "metrics.jsonl").read_text().splitlines()]
    assert [row["round"] for row in rows if "round" in row] == [1, 1, 2, 2, 3, 3]


# ---- Thresholds ------------------------------------------------------------------------------------


def group(*rewards: float | None) -> Group:
    return Group(Prompt("p"), tuple(Completion("", (i,)) for i in range(len(rewards))), rewards)


@pytest.mark.parametrize(
    ("rewards", "q", "tau"),
    [
        ((1, 2, 3, 4), 0.5, 2),  # 3 and 4 are above it: half
        ((1, 2, 3, 4), 0.6, 3),  # at most 0.4 of 4: one
        ((1, 2, 3, 4), 0.95, 3),  # the best in any case
        ((1, 2, 3, 4), 0.0, 1),
        (tuple(range(1, 101)), 0.55, 55),  # the float nearest to 0.55, times 100, lies above 55
        ((0, 0, 0, 1), 0.5, 0),
        ((0, 1, 1, 1), 0.5, 0),  # more are best than would be kept
    ],
)
def test_quantiles_by_hand(rewards: tuple[float, ...], q: float, tau: float) -> None:
    halves = [group(*rewards[:2], None), group(*rewards[2:])]
    assert threshold(halves, q, "quantile", "here") == tau


@given(st.lists(st.integers(0, 9), min_size=2, max_size=30), st.floats(0, 0.999))
def test_a_quantile_keeps_the_best_and_few_others(rewards: list[int], q: float) -> None:
    if len(set(rewards)) == 1:
        with pytest.raises(RunError, match=f"here: all {len(rewards)} rewards are {rewards[0]}"):
            threshold([group(*rewards)], q, "quantile", "here")
        return
    tau = threshold([group(*rewards)], q, "quantile", "here")
    above = [r for r in rewards if r > tau]
    assert above.count(max(rewards)) == rewards.count(max(rewards))
    assert len(above) <= (1 - q) * len(rewards) + 1e-9 or set(above) == {max(rewards)}


def test_without_a_usable_reward() -> None:
    with pytest.raises(RunError, match="round 2: no completion has a usable reward"):
        threshold([group(None, None)], 0.5, "reward", "round 2")
