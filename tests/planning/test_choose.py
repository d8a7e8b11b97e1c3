"""Choices follow from what a user has."""

from __future__ import annotations

from typing import Any

import pytest

from palate.errors import ConfigError
from palate.planning.choose import Choice, choose
from palate.planning.options import ChooseOptions
from palate.planning.speed import Rates
from palate.settings import load_config


def chosen(tiny: str, **options: Any) -> dict[str, Choice]:
    return {c.name: c for c in choose(ChooseOptions.model_validate({"model": tiny, **options}))}


def test_pairs_fit_offline_methods_and_those_with_a_trained_reward(tiny: str) -> None:
    choices = chosen(tiny, have="pairs=500")
    assert choices["dpo"].missing == ()
    assert choices["dpo"].commands == (f"palate run dpo --data pairs.jsonl --model {tiny}",)
    first, second = choices["iterative-dpo"].commands
    assert first.startswith("palate run reward-model")
    assert "--reward model:runs/reward" in second
    assert "completion=chosen" in choices["sft"].commands[0]


def test_prompts_alone_fit_only_a_policy_that_judges_itself(tiny: str) -> None:
    choices = chosen(tiny, have="prompts")
    assert [name for name, c in choices.items() if not c.missing] == ["self-rewarding"]
    assert choices["oaif"].missing == ("needs prompts with a reward or a judge",)
    assert choices["dpo"].missing == ("needs pairs",)


def test_a_reward_is_no_judge_for_d_rlaif(tiny: str) -> None:
    assert "reward" in chosen(tiny, have="prompts,reward")["oaif"].commands[0]
    assert chosen(tiny, have="demonstrations")["rlaif"].missing[0].count("judge") >= 1


def test_limits_exclude_with_their_figures(tiny: str) -> None:
    choices = chosen(tiny, have="prompts=10000,judge", money=1, price_in=10.0, price_out=30.0)
    assert any("dollars, you have 1" in reason for c in choices.values() for reason in c.missing)
    small = chosen(tiny, have="pairs", memory=1e-6)
    assert all("GB of memory" in c.missing[0] or "needs" in c.missing[0] for c in small.values())


def test_hours_count_only_with_rates(tiny: str) -> None:
    slow = Rates(0, 0, 10.0, 10.0, 1.0, 1.0, 10.0, 1.0)
    options = ChooseOptions.model_validate({"model": tiny, "have": "pairs,reward", "hours": 0.1})
    assert all(any("hours here" in m for m in c.missing) for c in choose(options, slow))


def test_ranked_by_the_measured_comparison(tiny: str) -> None:
    options = ChooseOptions.model_validate({"model": tiny, "have": "prompts,reward"})
    fitting = [c for c in choose(options) if not c.missing]
    rates = [c.win_rate or 0.5 for c in fitting]
    assert rates == sorted(rates, reverse=True)
    assert all(any("not measured" in r for r in c.reasons_against) for c in fitting if c.win_rate is None)


@pytest.mark.parametrize("have", ["gold", "pairs=x", "pairs=0", ""])
def test_unknown_means_are_refused(have: str) -> None:
    with pytest.raises(ConfigError, match="have"):
        load_config(ChooseOptions, file=None, flags={"have": have})


def test_money_needs_the_price_of_the_judge(tiny: str) -> None:
    with pytest.raises(ValueError, match="the judge's price is not given"):
        chosen(tiny, have="prompts,judge", money=50)
    assert chosen(tiny, have="prompts,reward", money=50)["oaif"].missing == ()
    free = chosen(tiny, have="prompts,judge")["oaif"]
    assert free.dollars is None
    assert any("whose price is not given" in reason for reason in free.reasons_for)


def test_a_method_that_judges_itself_needs_prompts_only(tiny: str) -> None:
    assert chosen(tiny, have="reward")["self-rewarding"].missing == ("needs prompts",)
