from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from palate.annotate import against_first, judged, scored
from palate.config import Sampling
from palate.errors import AnnotatorError
from palate.evaluate import Evaluation, compare, kl_from
from palate.journal import Journal
from palate.learn import Policy
from palate.model import TokenValues
from palate.statistics import rate_interval
from palate.testing import ScriptedJudge, ScriptedScorer, tiny_model, tiny_policy
from palate.types import Completion, Finish, Group, Prompt

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
    assert (found.win_rate_low, found.win_rate_high) == rate_interval([1, 0.5, 0, 1])[1:3]
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


def test_the_kl_is_that_of_the_policy_whatever_it_samples_with(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    # Over one token it can be enumerated.
    snapshots = []
    for seed in (1, 2):
        directory = tmp_path_factory.mktemp("model")
        tiny_model(directory, chat=True, seed=seed, initializer_range=0.3)
        snapshots.append(tiny_policy(directory).snapshot())
    ref, policy = snapshots
    prompt = Prompt("which?")
    every = [Group(prompt, tuple(Completion("", (token,)) for token in range(259)))]
    new, old = (snapshot.logps(every).sum().double() for snapshot in (policy, ref))
    exact = float((new.exp() * (new - old)).sum())
    spread = float((new.exp() * (new - old - exact).square()).sum().sqrt())
    biased = 0
    for changes in ({"temperature": t} for t in (0.5, 0.7, 1.0, 1.2)), ({"top_k": 5}, {"top_p": 0.6}):
        for change in changes:
            sampling = Sampling(max_new_tokens=1, **change)
            asked = [Prompt("which?", where=str(i)) for i in range(2000)]
            estimate = kl_from(ref, policy, asked, sampling, seed=7)
            assert abs(estimate - exact) < 4 * spread / math.sqrt(len(asked))
            drawn = policy.sample(asked, 1, sampling, seed=7)
            ratios = (policy.logps(drawn).sum() - ref.logps(drawn).sum()).double()
            biased += abs(float(ratios.mean()) - exact) > 4 * float(ratios.std()) / math.sqrt(len(asked))
    assert biased == 5  # the mean log-ratio of such samples is another number, but for temperature 1


def test_completions_that_are_drawn_already_serve_the_kl(make_policy: Callable[..., Policy]) -> None:
    calls: list[Sampling] = []

    def counted(prompts: Any, n: int, sampling: Sampling, *, seed: int) -> list[Group]:
        calls.append(sampling)
        return draw(prompts, n, sampling, seed=seed)

    one, two = (make_policy().snapshot() for _ in range(2))
    draw, two.sample = two.sample, counted  # type: ignore[method-assign]
    compare(one, two, PROMPTS, ANNOTATE, SAMPLING, seed=3)
    assert calls == [SAMPLING]
    compare(one, two, PROMPTS, ANNOTATE, Sampling(max_new_tokens=8, temperature=0.5, top_k=3), seed=3)
    assert [(s.temperature, s.top_k, s.max_new_tokens) for s in calls[1:]] == [(0.5, 3, 8), (1.0, 0, 8)]


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
