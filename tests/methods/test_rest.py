from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError

from palate import loops
from palate.errors import RunError
from palate.methods.rest import ReSTConfig
from palate.types import Example, Group

Taught = Callable[..., Any]


@pytest.mark.parametrize(("lora", "lr", "enough"), [(False, 1e-2, 0.12), (True, 4e-2, 0.04)])
@pytest.mark.parametrize(
    "options",
    [
        {"threshold_by": "quantile", "thresholds": (0.6, 0.8)},
        {"threshold_by": "reward", "thresholds": (0.3, 0.45), "reduce": "mean"},
    ],
    ids=["quantile", "reward"],
)
def test_the_reward_rises(
    taught: Taught, lora: bool, lr: float, enough: float, options: dict[str, Any]
) -> None:
    # Without selection, a run rises or falls by 0.013 at random. An adapter on the layers of a random model
    # can do less than all weights.
    found = taught("rest", lora=lora, lr=lr, n=16, rounds=2, steps=15, **options)
    assert found.rise > enough
    scores = [row["objective/scores"] for row in found.rows]
    assert scores[0] < scores[-1]  # what the second round has grown is better


def test_a_threshold_that_tells_nothing_raises_nothing(taught: Taught) -> None:
    # What learning from own samples does without selection: the policy imitates itself.
    # A run moves by 0.013 at random; with the best third alone, the mean of such runs rises by 0.12.
    runs = [taught("rest", n=8, steps=12, lr=1e-2, thresholds=(-1.0,), seed=seed) for seed in range(3)]
    assert all(found.rows[-1]["completions/kept"] == 128 for found in runs)
    assert abs(fmean(found.rise for found in runs)) < 0.05


def test_a_round_ends_when_the_reward_on_prompts_kept_out_falls(
    taught: Taught, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards = iter([0.1, 0.3, 0.2, 0.5, 0.4])  # before and after the Improve steps of two rounds
    monkeypatch.setattr(loops, "mean_reward", lambda *_: next(rewards))
    found = taught("rest", n=4, rounds=2, steps=1, thresholds=(0.0, 0.1, 0.2), validation=2)
    steps = [row for row in found.rows if "loss" in row]
    # 0.1 -> 0.3 -> 0.2 falls in the second Improve step; the second round begins at 0.5 and falls at once.
    assert [(row["round"], row["improve"]) for row in steps] == [(1, 1), (1, 2), (2, 1)]
    assert next(rewards, None) is None


def test_prompts_kept_out_are_measured_and_not_grown_from(taught: Taught) -> None:
    found = taught("rest", n=2, rounds=1, steps=1, thresholds=(0.0,), validation=3)
    measured = [row for row in found.rows if "eval_objective/scores" in row]
    assert [row["step"] for row in measured] == [0, 1]


def test_grow_and_improve(taught: Taught) -> None:
    found = taught("rest", n=4, rounds=2, steps=2, lr=1e-2, lr_decay=0.5, thresholds=(0.0, 0.25, 0.5))
    steps = [row for row in found.rows if "loss" in row]
    assert [row["round"] for row in steps] == [1] * 6 + [2] * 6
    assert [row["improve"] for row in steps] == [1, 1, 2, 2, 3, 3] * 2
    assert [row["threshold"] for row in steps[::2]] == [0.0, 0.25, 0.5] * 2
    # Less is learnt from at a lower rate in each Improve step, and the next Grow begins anew.
    assert [row["learning_rate"] for row in steps[::2]] == pytest.approx([1e-2, 5e-3, 2.5e-3] * 2)
    kept = [row["completions/kept"] for row in steps[::2]]
    assert kept[0] > kept[1] > kept[2] > 0
    assert kept[3] > kept[4] > kept[5] > 0
    assert len({row["objective/scores"] for row in steps[:6]}) == 1  # one set for all Improve steps


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[Sequence[Example]]:
    """What each Improve step learns from."""
    seen: list[Sequence[Example]] = []

    def spy(policy: Any, examples: Sequence[Example], *args: Any, **options: Any) -> None:
        seen.append(examples)
        fit(policy, examples, *args, **options)

    fit = loops.fit
    monkeypatch.setattr(loops, "fit", spy)
    return seen


def by_hand(groups: Sequence[Group]) -> list[Group]:
    """Rewards that tokens decide: 0 to 30 thirtieths."""
    return [g.annotated(tuple(sum(c.token_ids) % 31 / 30 for c in g.completions)) for g in groups]


def test_what_is_above_the_threshold_is_learnt_from(taught: Taught, fits: Any) -> None:
    sampled: list[Group] = []

    def annotate(groups: Sequence[Group]) -> list[Group]:
        sampled.extend(by_hand(groups))
        return by_hand(groups)

    taught("rest", annotate, n=4, thresholds=(0.5, 0.9), steps=1)
    everything = [
        (g.prompt, c, r) for g in sampled for c, r in zip(g.completions, g.rewards or (), strict=True)
    ]
    for tau, examples in zip((0.5, 0.9), fits, strict=True):
        assert examples == [Example(p, c) for p, c, r in everything if r is not None and r > tau]


def test_data_at_hand_are_filtered_like_samples(taught: Taught, fits: Any, tmp_path: Path) -> None:
    rows = [{"prompt": f"d{i}", "completion": "A" * i} for i in range(1, 5)]
    file = tmp_path / "demonstrations.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def annotate(groups: Sequence[Group]) -> list[Group]:
        return [
            g.annotated(tuple(0.1 * len(c.text) if c.policy_version is None else 0.5 for c in g.completions))
            for g in groups
        ]

    taught("rest", annotate, n=2, rounds=2, thresholds=(0.25,), steps=1, demonstrations=str(file))
    for examples in fits:
        shown = [e.completion.text for e in examples if e.completion.policy_version is None]
        assert shown == ["AAA", "AAAA"]  # rewards of 0.1 to 0.4
        assert len(examples) == 32 + 2


@pytest.mark.parametrize(("reduce", "same"), [("token", True), ("mean", True), ("sum", False)])
def test_how_tokens_count(taught: Taught, reduce: str, same: bool) -> None:
    found = taught("rest", n=2, thresholds=(-1.0,), steps=1, reduce=reduce)
    (row,) = found.rows
    per_completion = -row["logps/completion"]
    assert (row["loss"] == pytest.approx(per_completion, rel=1e-5)) != same
    assert same == (row["loss"] < math.log(259) + 3)  # per token; wide random weights are far from uniform


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"thresholds": (2.0,)}, r"round 1: none of 32 completions has a reward above the threshold 2, the"),
        ({"thresholds": (-1.0, 2.0)}, r"lower --thresholds, or use --threshold-by quantile"),
    ],
)
def test_a_threshold_out_of_reach(taught: Taught, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        taught("rest", n=2, **options)


def test_thresholds_that_do_not_rise() -> None:
    with pytest.raises(ValidationError, match="thresholds must rise"):
        ReSTConfig(data="x", thresholds=(0.7, 0.7))
    with pytest.raises(ValidationError, match="thresholds are quantiles"):
        ReSTConfig(data="x", thresholds=(0.7, 1.0), threshold_by="quantile")
    with pytest.raises(ValidationError, match="thresholds"):
        ReSTConfig(data="x", thresholds=())


def test_defaults() -> None:
    cfg = ReSTConfig(data="x")
    assert (cfg.rounds, cfg.thresholds, cfg.threshold_by) == (1, (0.7, 0.8, 0.9, 0.95), "reward")


@pytest.mark.parametrize("given", ["0.5,0.9", ["0.5", "0.9"], ["0.5,0.9"], [0.5, 0.9], "0.5, 0.9"])
def test_thresholds_as_people_write_them(given: Any) -> None:
    assert ReSTConfig(data="x", thresholds=given).thresholds == (0.5, 0.9)
