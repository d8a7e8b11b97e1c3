from __future__ import annotations

import math
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.methods import METHODS
from palate.report.words import (
    best_figures,
    count,
    duration,
    how_it_ended,
    interval,
    moment,
    number,
    percent,
    signed,
    ticks,
    unmeasured,
    unsampled,
    what_was_run,
)
from palate.rundir import RunRecord, Status

Record = Callable[..., RunRecord]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.3071, "0.307"), (0.0, "0"), (-105.5, "−106"), (12.4, "12.4"), (1234.5, "1,234"), (1e-6, "1.00e−6"),
        (-2.5e9, "−2.50e9"), (1e-4, "0.000100"), (None, "–"), (math.nan, "–"), (math.inf, "–"),
    ],
)  # fmt: skip
def test_numbers(value: float | None, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.534, "+0.53"), (-0.2, "−0.20"), (0.0, "0.00"), (-0.001, "0.00"), (1200.0, "+1,200.00")],
)
def test_differences(value: float, text: str) -> None:
    assert signed(value) == text


def test_rates_and_counts() -> None:
    assert percent(0.94) == "94.0\N{NO-BREAK SPACE}%"
    assert percent(None) == "–"
    assert interval(0.875, 0.972) == "[87.5\N{NO-BREAK SPACE}%, 97.2\N{NO-BREAK SPACE}%]"
    assert interval(None, 0.9) == ""
    assert count(1200.0) == "1,200"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (42, "42 s"), (59.7, "1 min 00 s"), (291, "4 min 51 s"), (7500, "2 h 05 min"),
     (360_000, "100 h 00 min")],
)  # fmt: skip
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_moments() -> None:
    assert moment("2026-11-01T14:02:11+0000") == "1 November 2026, 14:02"
    assert moment("once") == "once"


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        ([0.0, 0.06, 0.12], ["0.00", "0.06", "0.12"]),
        ([0.0, 50.0, 100.0], ["0", "50", "100"]),
        ([-107.25, -107.0], ["−107.25", "−107.00"]),
        ([-0.3, -0.0, 0.3], ["−0.3", "0.0", "0.3"]),
        ([3.0], ["3"]),
        ([], []),
        ([0.0, 1e-6, 2e-6], ["0", "1.0e−6", "2.0e−6"]),
        ([1e9, 2e9], ["1.0e9", "2.0e9"]),
    ],
)
def test_ticks(values: list[float], texts: list[str]) -> None:
    assert ticks(values) == texts


@given(start=st.integers(-1000, 1000), power=st.integers(-8, 8), size=st.integers(2, 6))
def test_ticks_differ(start: int, power: int, size: int) -> None:
    texts = ticks([(start + i) * 10.0**power for i in range(size)])
    assert len(set(texts)) == size


# ---- Sentences -------------------------------------------------------------------------------------


def test_what_was_run(record: Record) -> None:
    config = {"model": "org/smollm2", "lora": True, "lora_rank": 16, "data": "d/prompts.jsonl",
              "reward": ["sentiment", "0.5*length:40"], "batch_size": 16}  # fmt: skip
    assert what_was_run(record(config=config)) == (
        "oaif trained smollm2 (LoRA, rank 16) on prompts.jsonl, rewarded by sentiment + 0.5*length:40: "
        "4 steps of 16 prompts."
    )


def test_what_was_run_with_all_weights_on_pairs(record: Record) -> None:
    config = {"model": "m", "lora": False, "data": "p", "reward": [], "batch_size": 8, "epochs": 1.0}
    run = record(config=config, method="dpo", status=Status("finished", 1, 1))
    assert what_was_run(run) == "dpo trained m (all weights) on p: 1 step of 8 pairs."


def test_what_was_run_of_next_to_nothing(record: Record) -> None:
    assert what_was_run(record(status=Status("failed"))) == "oaif."


@pytest.mark.parametrize(
    ("status", "text"),
    [
        (Status("finished", 4, 4, "", 61), "It finished after 1 min 01 s."),
        (Status("running", 2, 4, "", 30), "It is running, at step 2 of 4 after 30 s; run `palate report` "
        "again for newer figures."),
        (Status("failed", 2, 4, "the reward broke. ", 30), "It failed at step 2 of 4 after 30 s: the "
        "reward broke."),
        (Status("failed"), "It failed before the end of the first step: no reason was recorded."),
    ],
)  # fmt: skip
def test_how_it_ended(record: Record, status: Status, text: str) -> None:
    assert how_it_ended(record(status=status)) == text


@pytest.mark.parametrize("state", ["killed", "interrupted"])
def test_a_run_that_can_go_on_says_so(record: Record, state: str) -> None:
    said = how_it_ended(record(status=Status(state, 3, 4)))  # type: ignore[arg-type]
    assert said == (
        f"It was {state} at step 3 of 4. To resume it from its last checkpoint, repeat the same "
        "command (without --overwrite)."
    )


def test_best_figures_of_a_finished_run(record: Record) -> None:
    summary = {"win_rate": 0.94, "win_rate_low": 0.875, "win_rate_high": 0.972, "compared": 100,
               "reward_before": 0.307, "reward_after": 0.861}  # fmt: skip
    assert best_figures(record(summary=summary)).replace("\N{NO-BREAK SPACE}", " ") == (
        "Its win rate against the model before training is 94.0 % [87.5 %, 97.2 %] on 100 held-out prompts. "
        "Mean reward changed from 0.307 to 0.861."
    )


def test_best_figures_of_pairs(record: Record) -> None:
    summary = {"accuracy_after": 0.69, "accuracy_low": 0.573, "accuracy_high": 0.787, "held_out_pairs": 200}
    assert best_figures(record(summary=summary)).replace("\N{NO-BREAK SPACE}", " ") == (
        "Its accuracy on held-out pairs is 69.0 % [57.3 %, 78.7 %] (200 pairs)."
    )


def test_best_figures_before_the_end(record: Record) -> None:
    said = "On fresh samples, mean reward changed from 0.100 in the first step to 0.400."
    assert best_figures(record({"objective/scores": [0.1, 0.2, 0.4]})) == said
    assert best_figures(record()) == ""


def test_best_figures_of_samples_that_several_steps_learn_from(record: Record) -> None:
    scores = {"objective/scores": [0.25, 0.25, 0.5]}
    said = "On fresh samples, mean reward changed from 0.250 in the first round to 0.500."
    assert best_figures(record({**scores, "round": [1, 1, 2]})) == said
    said = "The training samples were drawn once; their mean reward is 0.250."
    assert best_figures(record({"objective/scores": [0.25] * 3, "candidates/kept": [4] * 3})) == said


def test_best_figures_of_demonstrations(record: Record) -> None:
    summary = {"held_out": 12, "loss_before": 5.5, "loss_after": 4.25}
    assert best_figures(record(summary=summary)) == (
        "The loss changed from 5.50 to 4.25 on 12 held-out demonstrations."
    )


OWN = ("prompts", "rewarded")
SAID = {
    "oaif": OWN, "rlhf": OWN, "rlaif": OWN, "self-rewarding": ("pairs", "rewarded"),
    "iterative-dpo": ("pairs", "rewarded"),
    "pairwise-cringe": ("pairs", "rewarded"),
    "slic-hf": ("pairs", "rewarded"), "rso": ("pairs", "rewarded"), "click": ("pairs", "rewarded"),
    "rrhf": ("groups", "rewarded"), "rft": ("completions", "rewarded"), "rest": ("completions", "rewarded"),
    "sft": ("demonstrations", "evaluated"), "spin": ("pairs", "evaluated"), "dpo": ("pairs", "evaluated"),
    "ipo": ("pairs", "evaluated"), "reward-model": ("pairs", ""),
}  # fmt: skip
"""What a batch of each method is of, and what its reward is for."""


@pytest.mark.parametrize("method", METHODS)
def test_what_was_run_of_each_method(record: Record, method: str) -> None:
    given = {name: value for name, value in METHODS[method].defaults().items() if name != "label"}
    config = {
        **given,
        "model": "m",
        "data": "d",
        "reward": ["r"] if "reward" in given else [],
        "batch_size": 4,
    }
    said = what_was_run(record(config=config, method=method))
    unit, reward = SAID[method]
    assert f": 4 steps of 4 {unit}" in said
    assert (f", {reward} by r:" in said) == bool(reward)
    assert said.startswith(f"{method} ({given['variant']}) " if "variant" in given else method)
    if METHODS[method].variant("direct").learns_from == "pairs" and METHODS[method].others:
        said = what_was_run(record(config={**config, "variant": "direct"}, method=method))
        assert f"{method} (direct) trained m" in said
        assert said.endswith("on d, evaluated by r: 4 steps of 4 pairs.")


def test_what_was_run_in_rounds(record: Record) -> None:
    run = record(config={"epochs": 1.0, "batch_size": 1, "rounds": 3}, method="rft")
    assert what_was_run(run) == "rft: 4 steps of 1 completion in 3 rounds."


def test_what_to_give_for_held_out_figures(record: Record) -> None:
    none = record(config={"eval_data": None, "reward": []})
    assert unmeasured([none]) == "; add --eval-data and --reward to compare completions"
    assert unmeasured([none, record(config={"eval_data": "d", "reward": []})]) == (
        "; add --reward to compare completions"
    )
    assert unmeasured([record(config={"eval_data": "d", "reward": ["r"]})]) == ""
    assert "--eval-data" in unsampled([none])
    assert unsampled([record(method="reward-model")]) == ": a reward model cannot generate text"
