from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from palate.errors import RunError
from palate.methods import METHODS
from palate.methods.spin import SPINConfig, against, spin
from palate.run import Run
from palate.testing import tiny_policy
from palate.types import Completion, Example, Group, Pair, Prompt

Fitted = Callable[..., tuple[list[dict[str, Any]], Any]]
SHORT = {"max_new_tokens": 8, "epochs": 1.0, "steps": None}


def steps_of(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in found if "loss" in row]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("loss", ["dpo", "hinge_norm"])
def test_demonstrations_come_to_be_told_from_its_own_answers(fitted: Fitted, lora: bool, loss: str) -> None:
    found, _ = fitted("spin", lora=lora, loss=loss, rounds=2, max_new_tokens=8, steps=12)
    ranked = [row["eval_rewards/accuracies"] for row in found if "eval_rewards/accuracies" in row]
    likely = [row["eval_logps/chosen"] for row in found if "eval_logps/chosen" in row]
    # The opponent is the reference, so a round begins at even; by chance 40 pairs go beyond 0.75 once in a
    # thousand.
    assert (ranked[0], ranked[2]) == (0.5, 0.5)
    assert ranked[1] >= 0.8
    assert ranked[3] >= 0.8
    assert likely[-1] > likely[0]  # and the demonstrations have become likelier


def test_the_opponent_is_renewed(fitted: Fitted) -> None:
    found, _ = fitted("spin", rounds=3, pairs=16, held_out=0, **SHORT)
    steps = steps_of(found)
    assert [row["round"] for row in steps] == [1] * 2 + [2] * 4 + [3] * 4
    for row in (
        steps[0],
        steps[2],
        steps[6],
    ):  # each round begins at its reference, whatever was learnt before
        assert row["loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert row["rewards/margins"] == 0.0
    for row in (steps[1], steps[3], steps[7]):
        assert row["rewards/margins"] != 0.0


@pytest.mark.parametrize(("past", "steps"), [(0, [2, 2, 2]), (1, [2, 4, 4]), (5, [2, 4, 6])])
def test_answers_of_earlier_rounds_are_learnt_from(fitted: Fitted, past: int, steps: list[int]) -> None:
    # 16 pairs in batches of 8 are 2 steps a round, once for each round that is learnt from.
    found, _ = fitted("spin", rounds=3, pairs=16, held_out=0, past_rounds=past, **SHORT)
    rounds = [row["round"] for row in steps_of(found)]
    assert [rounds.count(t) for t in (1, 2, 3)] == steps


def test_every_round_has_a_schedule_of_its_own(fitted: Fitted) -> None:
    options = {"rounds": 3, "schedule": "linear", "lr": 1e-3, "late_lr": 1e-4, "past_rounds": 0}
    found, _ = fitted("spin", pairs=16, held_out=0, **options, **SHORT)
    rates = [row["learning_rate"] for row in steps_of(found)]
    assert rates == pytest.approx([1e-3, 5e-4, 1e-3, 5e-4, 1e-4, 5e-5])


def test_the_last_round_may_have_a_beta_of_its_own(fitted: Fitted) -> None:
    found, _ = fitted("spin", rounds=2, pairs=8, held_out=0, past_rounds=0, last_beta=5.0, **SHORT)
    assert [row["beta"] for row in steps_of(found)] == [0.1, 5.0]


def test_an_answer_that_says_the_same_is_no_rejected() -> None:
    example = Example(Prompt("q"), Completion("yes", (1, 2)))
    answers = [Completion("yes", (1, 2)), Completion("yes ", (3,)), Completion("no", (4,))]
    groups = [Group(example.prompt, (answer,)) for answer in answers]
    assert against([example] * 3, groups) == [Pair(example.prompt, example.completion, answers[2])]


def test_the_summary_has_no_accuracy_of_the_whole_run() -> None:
    # Every round has an opponent of its own, at which its accuracy begins at one half.
    run = SimpleNamespace(
        measured=[
            {"eval_logps/chosen": value, "eval_rewards/accuracies": accuracy}
            for value, accuracy in ((-9.0, 0.5), (-7.0, 0.9), (-8.0, 0.5), (-5.0, 0.8))
        ]
    )
    summarise = METHODS["spin"].summarise
    assert summarise is not None
    found = summarise(None, run, [None, None])
    assert found == {"held_out": 2, "held_out_logps_before": -9.0, "held_out_logps_after": -5.0}


def test_what_it_logs_of_its_answers(fitted: Fitted) -> None:
    found, _ = fitted("spin", rounds=1, pairs=16, held_out=0, **SHORT)
    for row in steps_of(found):
        assert row["logps/fresh"] < 0
        assert row["logps/training"] < 0
        assert row["completions/max_length"] <= 8
        assert (row["pairs/kept"], row["pairs/dropped"]) == (16, 0)
        assert "objective/unusable" not in row  # nobody scores them


def test_an_answer_equal_to_the_demonstration_is_no_pair() -> None:
    a, b = Completion("a", (1, 2)), Completion("b", (1, 3))
    examples = [Example(Prompt("p"), a), Example(Prompt("q"), a)]
    groups = [Group(Prompt("p"), (b,)), Group(Prompt("q"), (a,))]
    (pair,) = against(examples, groups)
    assert (pair.prompt.content, pair.chosen, pair.rejected) == ("p", a, b)


def test_a_policy_that_answers_as_the_data_do_is_told_to_stop(tiny: str, tmp_path: Path) -> None:
    # At temperature 0 and with two new tokens, its answers can be known beforehand.
    cfg = SPINConfig(data="-", output=tmp_path / "run", temperature=0, max_new_tokens=2)
    policy = tiny_policy(Path(tiny))
    prompts = [Prompt("one"), Prompt("two")]
    known = policy.snapshot().sample(prompts, 1, cfg.sampling, seed=5)
    examples = [Example(group.prompt, group.completions[0]) for group in known]
    with (
        Run(cfg, method="spin") as run,
        pytest.raises(RunError, match="round 1 has nothing to learn from: all 2"),
    ):
        spin(policy, examples, cfg, run)


def test_defaults_are_the_papers() -> None:
    cfg = SPINConfig(data="x")
    assert (cfg.rounds, cfg.epochs, cfg.beta, cfg.loss, cfg.past_rounds) == (4, 2.0, 0.1, "dpo", 1)
