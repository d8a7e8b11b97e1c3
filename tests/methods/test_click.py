from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError

from palate.errors import DataError, RunError
from palate.methods.click import ClickConfig
from palate.testing import tiny_policy
from palate.types import Completion, Example, Group, Prompt

Taught = Callable[..., Any]
Fitted = Callable[..., tuple[list[dict[str, Any]], Any]]

FREE = {"top_p": 1.0}
ENOUGH = 0.06
"""Six standard errors of the rise: 16 prompts, 32 completions each before and after, of shares with a
deviation of 0.165, so 0.165 * sqrt(2 / 512) = 0.0103."""


def good(completion: Completion) -> bool:
    """Half of all completions, by no more than chance."""
    return sum(completion.token_ids) % 2 == 0


class Asked:
    """Rewards of 1 and 0, and what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[Group]] = []

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        self.calls.append(list(groups))
        return [g.annotated(tuple(float(good(c)) for c in g.completions)) for g in groups]


# ---- It learns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seed"), [({}, 0), ({"direction": "either", "partner": "farthest"}, 1), ({"rounds": 2}, 2)]
)
def test_the_reward_rises(taught: Taught, options: dict[str, Any], seed: int) -> None:
    steps = 40 // options.get("rounds", 1)
    whole = {"steps": steps, "batch_size": 16, "lr": 2e-2, "n": 16, "threshold": 0.25, **FREE}
    prompts = [Prompt(f"q{i}") for i in range(64)]
    assert taught("click", None, prompts, **whole, **options, seed=seed).rise > ENOUGH


@pytest.mark.parametrize("lora", [False, True])
def test_direct_ranks_held_out_pairs(fitted: Fitted, lora: bool) -> None:
    found, _ = fitted("click", variant="direct", lora=lora, lr=1e-2 if lora else 3e-3, steps=40)
    before, after = [row for row in found if "eval_loss" in row]
    assert after["eval_loss"] < 0.7 * before["eval_loss"]
    # Without a reference, length confuses the order, so that some held-out pairs stay in the wrong one.
    assert after["eval_rewards/accuracies"] > before["eval_rewards/accuracies"] + 0.1


@pytest.mark.parametrize("lora", [False, True])
def test_what_the_policy_had_in_the_wrong_order_is_put_right(taught: Taught, lora: bool) -> None:
    found = taught("click", Asked(), n=8, steps=30, lora=lora, lr=1e-2, **FREE).rows
    assert found[0]["rewards/accuracies"] == 0.0  # every pair is one that the policy ranks wrongly
    assert fmean(row["rewards/accuracies"] for row in found[-5:]) > 0.7


# ---- The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.1, 0.5])
def test_the_loss_is_the_two_terms(taught: Taught, weight: float) -> None:
    (row,) = taught("click", Asked(), steps=1, pair_weight=weight).rows
    assert row["loss"] == pytest.approx(weight * row["rank_loss"] + row["nll_loss"], rel=1e-6)


def test_beta_is_the_margin_that_is_asked_for(taught: Taught) -> None:
    # Pairs that the policy ranks wrongly have a gap < 0: the hinge is margin - gap.
    for margin in (15.0, 20.0):
        (row,) = taught("click", Asked(), steps=1, beta=margin).rows
        gap = row["logps/chosen"] - row["logps/rejected"]
        assert row["rank_loss"] == pytest.approx(margin - gap, abs=1e-3)


def test_likelihood_per_token_or_of_the_whole(taught: Taught) -> None:
    (token,), (whole,) = (
        taught("click", Asked(), steps=1, likelihood=how, **FREE).rows for how in ("token", "sum")
    )
    assert whole["nll_loss"] == pytest.approx(-whole["logps/chosen"], rel=1e-6)
    assert token["logps/chosen"] == whole["logps/chosen"]  # the same batch
    assert 7 < whole["nll_loss"] / token["nll_loss"] <= 8  # its mean length, of 8 tokens unless it ended


def test_the_target_of_the_data_stays_likely(taught: Taught, base: str) -> None:
    prompt = Prompt("q", {"completion": "abc"})
    (row,) = taught("click", Asked(), [prompt], anchor="target", steps=1, **FREE).rows
    policy = tiny_policy(Path(base))
    target = Example(prompt, policy.model.codec.completion(prompt, "abc"))
    assert row["logps/anchor"] == pytest.approx(float(policy.logps([target]).sum()), abs=1e-4)
    with pytest.raises(DataError, match="column 'completion' is missing"):
        taught("click", Asked(), anchor="target")


# ---- Candidates ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("direction", "right"), [("above", 0.0), ("below", 1.0)])
def test_a_negative_is_likelier_or_less_likely(taught: Taught, direction: str, right: float) -> None:
    (row,) = taught("click", Asked(), direction=direction, steps=1, batch_size=32, **FREE).rows
    assert row["rewards/accuracies"] == right


def test_every_positive_makes_a_pair_or_is_counted(taught: Taught) -> None:
    asked = Asked()
    (row, *_) = taught("click", asked, **FREE).rows
    (groups,) = asked.calls
    positives = sum(good(c) for g in groups for c in g.completions)
    assert row["pairs/kept"] + row["pairs/dropped_passed_over"] == positives
    assert row["pairs/dropped_passed_over"] > 0  # at least the likeliest one of a group
    (every, *_) = taught("click", Asked(), direction="either", partner="all", **FREE).rows
    by_group = [(sum(map(good, g.completions)), len(g.completions)) for g in groups]
    assert every["pairs/kept"] == sum(plus * (n - plus) for plus, n in by_group)


def test_the_threshold_divides_good_and_bad(taught: Taught) -> None:
    with pytest.raises(RunError, match=r"round 1 gave nothing .*; change --threshold \(2\), raise"):
        taught("click", Asked(), threshold=2.0)
    with pytest.raises(RunError, match=r"change --threshold \(-1\)"):
        taught("click", Asked(), threshold=-1.0)


def test_each_round_draws_from_what_the_last_has_left(taught: Taught) -> None:
    asked = Asked()
    out = taught("click", asked, rounds=2, steps=2, n=8)
    assert [{c.policy_version for g in call for c in g.completions} for call in asked.calls] == [{0}, {2}]
    assert [row["step"] for row in out.rows] == [1, 2, 3, 4]


# ---- Configuration ---------------------------------------------------------------------------------


def test_defaults_are_the_published_codes() -> None:
    cfg = ClickConfig(data="x")
    assert (cfg.n, cfg.temperature, cfg.top_p, cfg.beta, cfg.pair_weight) == (20, 1.0, 0.9, 15.0, 0.5)
    assert (cfg.direction, cfg.partner, cfg.rounds) == ("above", "nearest", 1)


@pytest.mark.parametrize(
    "wrong", [{"beta": 0.0}, {"pair_weight": 0.0}, {"n": 1}, {"direction": "up"}, {"threshold": float("nan")}]
)
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        ClickConfig(data="x", **wrong)
