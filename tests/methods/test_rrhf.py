from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any

import pytest
from pydantic import ValidationError

from palate.annotate import scored
from palate.errors import DataError, RunError
from palate.methods.rrhf import RRHFConfig
from palate.testing import ScriptedScorer
from palate.types import Group, Prompt

Taught = Callable[..., Any]
Fitted = Callable[..., tuple[list[dict[str, Any]], Any]]

ENOUGH = 0.06
"""Six standard errors of the rise: 16 prompts, 32 completions each before and after, of shares with a
deviation of 0.165, so 0.165 * sqrt(2 / 512) = 0.0103."""


class Asked:
    """Scores by the bytes of a text, and keeps what it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[Group]] = []

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        self.calls.append(list(groups))
        return [g.annotated(tuple(float(sum(c.token_ids)) for c in g.completions)) for g in groups]


# ---- It learns -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "seed"), [({"steps": 40}, 0), ({"steps": 20, "rounds": 2}, 1), ({"rank_weight": 0.0}, 2)]
)
def test_the_reward_rises(taught: Taught, options: dict[str, Any], seed: int) -> None:
    whole = {"steps": 40, "batch_size": 16, "lr": 1e-2, "n": 8, "temperature": 1.0, "seed": seed}
    assert taught("rrhf", **{**whole, **options}).rise > ENOUGH


@pytest.mark.parametrize("lora", [False, True])
def test_direct_ranks_held_out_pairs(fitted: Fitted, lora: bool) -> None:
    found, _ = fitted("rrhf", variant="direct", lora=lora, lr=1e-2 if lora else 3e-3)
    before, after = [row for row in found if "eval_loss" in row]
    assert after["eval_loss"] < 0.9 * before["eval_loss"]
    # By chance, 40 pairs go beyond 0.75 once in a thousand. Means per token do not mind lengths.
    assert after["eval_rewards/accuracies"] >= 0.75


@pytest.mark.parametrize("lora", [False, True])
def test_its_own_samples_come_to_be_ranked(taught: Taught, lora: bool) -> None:
    found = taught("rrhf", n=6, steps=30, batch_size=16, lora=lora, lr=1e-2).rows
    ranked = [row["rewards/accuracies"] for row in found]
    assert fmean(ranked[-5:]) > max(0.8, ranked[0] + 0.1)  # a random model ranks about half of its pairs
    first, last = (fmean(row["rank_loss"] for row in rows) for rows in (found[:5], found[-5:]))
    assert last < 0.5 * first


# ---- The loss --------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.0, 1.0, 10.0])
def test_the_loss_is_the_two_terms(taught: Taught, weight: float) -> None:
    (row,) = taught("rrhf", steps=1, rank_weight=weight).rows
    assert row["rank_loss"] > 0
    assert row["loss"] == pytest.approx(weight * row["rank_loss"] + row["nll_loss"], rel=1e-6)
    assert row["nll_loss"] == pytest.approx(-row["logps/chosen"], rel=1e-6)  # a sum over tokens


def test_direct_is_of_one_pair(fitted: Fitted) -> None:
    # L = max(0, p(rejected) - p(chosen)) - log pi(chosen): the only pair of unlike reward in the group.
    (row,), _ = fitted("rrhf", variant="direct", steps=1, batch_size=1, held_out=0)
    assert row["rank_loss"] == pytest.approx(max(0.0, -row["rewards/margins"]), abs=1e-5)
    assert row["loss"] == pytest.approx(row["rank_loss"] + row["nll_loss"], rel=1e-6)


# ---- Candidates ------------------------------------------------------------------------------------


def test_texts_of_the_data_join_the_samples(taught: Taught) -> None:
    asked = Asked()
    prompts = [Prompt(f"q{i}", {"chosen": f"yes{i}", "rejected": "no"}) for i in range(4)]
    found = taught("rrhf", asked, prompts, texts=["chosen", "rejected"], n=1).rows
    (groups,) = asked.calls
    assert [[c.text for c in g.completions[1:]] for g in groups] == [[f"yes{i}", "no"] for i in range(4)]
    assert found[0]["candidates/kept"] == 12
    assert found[0]["pairs/kept"] == 4


def test_a_text_that_is_missing_is_told_before_sampling(taught: Taught) -> None:
    asked = Asked()
    prompts = [Prompt("q0", {"chosen": "yes"}), Prompt("q1", {"chosen": None}, "d.jsonl:2")]
    with pytest.raises(DataError, match=r"d\.jsonl:2: column 'chosen' is None; expected a text"):
        taught("rrhf", asked, prompts, texts=["chosen"])
    assert asked.calls == []


def test_each_round_draws_from_what_the_last_has_left(taught: Taught) -> None:
    asked = Asked()
    out = taught("rrhf", asked, rounds=3, steps=2, schedule="linear")
    assert [{c.policy_version for g in call for c in g.completions} for call in asked.calls] == [
        {0},
        {2},
        {4},
    ]
    assert [row["step"] for row in out.rows] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in out.rows] == [3e-3, 1.5e-3] * 3  # a schedule each
    assert len({row["logps/fresh"] for row in out.rows}) == 3


def test_a_round_may_have_a_share_of_the_prompts(taught: Taught) -> None:
    asked = Asked()
    taught("rrhf", asked, rounds=2, steps=1, prompts_per_round=8)
    first, second = ({g.prompt.text for g in call} for call in asked.calls)
    assert len(first) == len(second) == 8
    assert not first & second


def test_groups_in_which_no_reward_differs_are_left_out(taught: Taught) -> None:
    def annotate(groups: Sequence[Group]) -> list[Group]:
        even = [int(g.prompt.text[1:]) % 2 == 0 for g in groups]
        return [
            g.annotated(tuple(0.0 if tied else float(i) for i in range(len(g.completions))))
            for g, tied in zip(groups, even, strict=True)
        ]

    (row, *_) = taught("rrhf", annotate).rows
    assert (row["pairs/kept"], row["pairs/dropped_tie"]) == (8, 8)
    with pytest.raises(RunError, match=r"round 1 gave nothing to learn from: .*\(dropped: 16 tie\)"):
        taught("rrhf", scored(ScriptedScorer(lambda text: 1.0)))


def test_what_has_no_reward_takes_no_part(taught: Taught) -> None:
    def annotate(groups: Sequence[Group]) -> list[Group]:
        return [g.annotated((None, 0.0, 1.0, None)[: len(g.completions)]) for g in groups]

    (row, *_) = taught("rrhf", annotate, temperature=1.0).rows
    assert row["pairs/kept"] == 16
    assert row["objective/unusable"] == 32


# ---- Configuration ---------------------------------------------------------------------------------


def test_defaults_are_the_papers() -> None:
    cfg = RRHFConfig(data="x")
    assert (cfg.variant, cfg.n, cfg.rank_weight, cfg.temperature, cfg.rounds) == ("sampled", 4, 1.0, 0.8, 1)


def test_one_completion_has_no_rank() -> None:
    with pytest.raises(
        ValidationError, match="n is 1 and texts is empty, so there is nothing to rank; raise"
    ):
        RRHFConfig(data="x", n=1)
    assert RRHFConfig(data="x", n=1, texts="chosen").texts == ("chosen",)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"n": 0}, {"rank_weight": -1.0}, {"rounds": 0}, {"temperature": 0}])
def test_numbers_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(wrong))):
        RRHFConfig(data="x", **wrong)
