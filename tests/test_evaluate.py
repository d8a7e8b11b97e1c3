from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom, binomtest

from palate.annotate import against_first, judged, scored
from palate.config import Sampling
from palate.errors import AnnotatorError
from palate.evaluate import Evaluation, compare, wilson
from palate.journal import Journal
from palate.learn import Policy
from palate.model.plain.forward import TokenValues
from palate.testing import ScriptedJudge, ScriptedScorer, tiny_model, tiny_policy
from palate.types import Completion, Finish, Group, Prompt

# ---- wilson ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("trials", [1, 2, 10, 37, 1000])
def test_against_scipy(trials: int, confidence: float) -> None:
    for wins in {0, 1, trials // 3, trials // 2, trials - 1, trials}:
        low, high = wilson(wins / trials, trials, confidence=confidence)
        theirs = binomtest(wins, trials).proportion_ci(confidence, method="wilson")
        assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)


@pytest.mark.parametrize("trials", [20, 100])
def test_it_covers_the_truth_as_often_as_it_says(trials: int) -> None:
    # Exactly: for a true rate, the chance of those counts whose interval holds it. It saws about the
    # nominal level, so its mean over the rates is what must be near it.
    intervals = np.array([wilson(k / trials, trials) for k in range(trials + 1)])
    rates = np.linspace(0.02, 0.98, 481)
    holds = (intervals[:, :1] <= rates) & (rates <= intervals[:, 1:])  # (counts, rates)
    chances = binom.pmf(np.arange(trials + 1)[:, None], trials, rates)
    coverage = (holds * chances).sum(0)
    assert 0.945 < coverage.mean() < 0.96
    assert coverage.min() > 0.83  # the known dip at the edges; Wald's interval falls to 0.3


def test_ties_as_halves_are_covered_too() -> None:
    # A trial that may end as a half varies less than a coin: the interval is then on the wide side.
    rng = np.random.default_rng(0)
    outcomes = rng.choice([0.0, 0.5, 1.0], p=[0.3, 0.3, 0.4], size=(2000, 50))
    intervals = [wilson(rate, 50) for rate in outcomes.mean(1)]
    assert np.mean([low <= 0.55 <= high for low, high in intervals]) > 0.95


def test_without_trials_nothing_is_known() -> None:
    assert wilson(math.nan, 0) == (0.0, 1.0)


@pytest.mark.parametrize("trials", [1, 5, 10**6])
def test_all_lost_and_all_won(trials: int) -> None:
    low, high = wilson(0.0, trials)
    assert 0.0 <= low < 1e-12
    assert low < high < 1.0
    mirrored = wilson(1.0, trials)
    assert mirrored == pytest.approx((1.0 - high, 1.0), abs=1e-12)
    assert mirrored[1] <= 1.0


def test_more_trials_narrow_it() -> None:
    widths = [high - low for low, high in (wilson(0.5, trials) for trials in (1, 10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)
    assert widths[2] / widths[3] == pytest.approx(math.sqrt(10), rel=0.05)


# ---- compare, counting -----------------------------------------------------------------------------


@dataclass
class Stored:
    """Stands for a policy: gives stored completions, and one log-probability for each."""

    texts: Sequence[Sequence[str]]
    logp: float = 0.0
    finish: Finish = "eos"
    seeds: Any = None

    def sample(self, prompts: Sequence[Prompt], n: int, sampling: Sampling, *, seed: int) -> list[Group]:
        self.seeds = seed
        return [
            Group(prompt, tuple(Completion(t, (1,) * max(1, len(t)), self.finish) for t in texts))
            for prompt, texts in zip(prompts, self.texts, strict=True)
        ]

    def logps(self, groups: Sequence[Group], *, kept: bool = False) -> TokenValues:
        assert kept, "what was computed is not computed again when a run is resumed"
        count = sum(len(group.completions) for group in groups)
        return TokenValues(torch.full((count, 1), self.logp), torch.ones(count, 1, dtype=torch.bool))


def number(text: str) -> float | None:
    return None if text == "?" else float(text)


def count(before: Sequence[Sequence[str]], after: Sequence[Sequence[str]], **options: Any) -> Evaluation:
    old, new = Stored(before), Stored(after, **options)
    prompts = [Prompt(str(i)) for i in range(len(before))]
    annotate = scored(ScriptedScorer(number))
    n = len(before[0])
    return compare(old, new, prompts, annotate, Sampling(), seed=1, n=n)  # type: ignore[arg-type]


def test_wins_ties_and_losses() -> None:
    found = count([["1"], ["1"], ["1"], ["1"]], [["2"], ["1"], ["0"], ["2"]])
    assert found.win_rate == (1 + 0.5 + 0 + 1) / 4
    assert found.compared == 4
    assert (found.win_rate_low, found.win_rate_high) == wilson(2.5 / 4, 4)
    assert (found.reward_before, found.reward_after) == (1.0, 1.25)


def test_swapping_the_two_mirrors_the_win_rate() -> None:
    one, two = [["1"], ["1"], ["5"], ["3"]], [["2"], ["1"], ["0"], ["4"]]
    assert count(one, two).win_rate + count(two, one).win_rate == 1.0


def test_a_prompt_without_a_usable_reward_on_one_side_is_left_out() -> None:
    found = count([["1"], ["?"], ["9"]], [["2"], ["5"], ["?"]])
    assert (found.win_rate, found.compared) == (1.0, 1)
    # Of the rewards as well: means over different prompts say nothing about the policies.
    assert (found.reward_before, found.reward_after) == (1.0, 2.0)


def test_several_completions_a_prompt_are_one_trial() -> None:
    found = count([["1", "1"], ["1", "?"], ["?", "1"]], [["2", "0"], ["2", "2"], ["2", "?"]])
    # The first prompt ends half and half, the second has one pair to judge, the third none.
    assert (found.win_rate, found.compared) == (0.75, 2)


def test_prompts_that_share_no_usable_reward() -> None:
    found = count([["1"], ["?"]], [["?"], ["1"]])
    assert found.compared == 0
    assert math.isnan(found.win_rate)
    assert (found.win_rate_low, found.win_rate_high) == (0.0, 1.0)


def test_nothing_usable_at_all() -> None:
    with pytest.raises(AnnotatorError, match="no usable reward for any of 8 completions"):
        count([["?"]] * 4, [["?"]] * 4)


@pytest.mark.parametrize("annotator", [judged, against_first])
def test_a_judge_is_shown_the_two_side_by_side(annotator: Any) -> None:
    judge = ScriptedJudge(lambda a, b: {True: 0.9, False: 0.2}[a > b] if a != b else 0.5)
    old, new = Stored([["1"], ["2"], ["3"]]), Stored([["2"], ["2"], ["1"]])
    prompts = [Prompt(str(i)) for i in range(3)]
    found = compare(old, new, prompts, annotator(judge), Sampling(), seed=1)  # type: ignore[arg-type]
    assert (found.win_rate, found.compared) == (0.5, 3)  # a win, a tie and a loss
    assert [group.completions[0].text for group in found.before] == ["1", "2", "3"]
    assert [group.completions[0].text for group in found.after] == ["2", "2", "1"]


def test_lengths_endings_and_kl() -> None:
    found = count([["1"], ["22"]], [["333"], ["4444"]], logp=0.5, finish="length")
    assert (found.length_before, found.length_after) == (1.5, 3.5)
    assert (found.eos_before, found.eos_after) == (1.0, 0.0)
    assert found.kl == 0.5  # log-probability of after's completions under after, less that under before
    assert count([["1"]], [["1"]], finish="stop").eos_after == 1.0


def test_the_summary_has_the_numbers_without_the_texts() -> None:
    found = count([["1"]], [["2"]])
    assert found.summary().keys() == set(vars(found)) - {"before", "after"}
    assert all(isinstance(value, int | float) for value in found.summary().values())


# ---- compare, with a model -------------------------------------------------------------------------

PROMPTS = [Prompt(f"question {i}") for i in range(12)]
SAMPLING = Sampling(max_new_tokens=8)
ANNOTATE = scored(ScriptedScorer(lambda text: float(sum(map(ord, text)))))


@pytest.mark.parametrize("lora", [False, True])
def test_a_policy_against_itself(make_policy: Callable[..., Policy], lora: bool) -> None:
    # The draws are independent, so that a policy wins against itself about as often as it loses.
    one, two = (make_policy(model={"lora": lora}).snapshot() for _ in range(2))
    found = compare(one, two, PROMPTS, ANNOTATE, SAMPLING, seed=3, n=2)
    assert found.win_rate_low < 0.5 < found.win_rate_high
    assert found.kl == 0.0
    assert found.compared == len(PROMPTS)
    assert found.before != found.after
    assert len({c.text for g in found.after for c in g.completions}) > len(PROMPTS)  # they were drawn


def test_two_policies(tmp_path_factory: pytest.TempPathFactory) -> None:
    policies = []
    for seed in (1, 2):
        directory = tmp_path_factory.mktemp("model")
        tiny_model(directory, chat=True, seed=seed, initializer_range=0.3)
        policies.append(tiny_policy(directory))
    before, after = (policy.snapshot() for policy in policies)
    found = compare(before, after, PROMPTS, ANNOTATE, SAMPLING, seed=3)
    # The KL is a mean over after's own completions, so it is that log-ratio, and here far above 0.
    ratios = after.logps(found.after).sum() - before.logps(found.after).sum()
    assert found.kl == pytest.approx(float(ratios.mean()))
    assert found.kl > 5
    assert [g.prompt for g in found.after] == PROMPTS
    assert found.before != found.after


def test_the_seed_decides(make_policy: Callable[..., Policy]) -> None:
    snapshot = make_policy().snapshot()
    one, same, other = (
        compare(snapshot, snapshot, PROMPTS, ANNOTATE, SAMPLING, seed=s).after for s in (1, 1, 2)
    )
    assert one == same != other


def test_an_evaluation_that_is_done_again_costs_nothing(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    # A run that was cut off in it, or was finished and is looked at again.
    found, told = [], []
    for _ in range(2):
        policy = make_policy(model={"fast": False})
        policy.memory = Journal(tmp_path / "journal.db")
        stages: list[str] = []
        policy.observe = lambda stage, amount, stages=stages: stages.append(stage)
        before, after = policy.snapshot(), policy.snapshot()
        found.append(compare(before, after, PROMPTS, ANNOTATE, SAMPLING, seed=1))
        told.append(stages)
        policy.memory.close()
    assert found[0] == found[1]
    assert "sample" in told[0]
    assert told[1] == []
