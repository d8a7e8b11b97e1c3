from __future__ import annotations

import pytest

from palate.annotate import scored, with_label_noise
from palate.testing import ScriptedScorer
from palate.types import Completion, Group, Prompt

LENGTH = scored(ScriptedScorer(lambda text: float(len(text)), name="length"))


def group(*texts: str, prompt: str = "Q") -> Group:
    return Group(Prompt(prompt), tuple(Completion(t, (1,)) for t in texts))


def test_no_noise_is_the_annotator_itself() -> None:
    assert with_label_noise(LENGTH, 0.0) is LENGTH


def test_certain_noise_swaps_every_winner_and_no_tie() -> None:
    groups = with_label_noise(LENGTH, 1.0)([group("a", "bbb"), group("aa", "bb"), group("a", "bb", "ccc")])
    assert [g.rewards for g in groups] == [(1.0, 0.0), (0.5, 0.5), (1.0, 0.5, 0.0)]


def test_a_share_of_the_comparisons_is_swapped() -> None:
    groups = [group("a", "bbb", prompt=str(i)) for i in range(2000)]
    swapped = sum(g.rewards == (1.0, 0.0) for g in with_label_noise(LENGTH, 0.2)(groups))
    assert swapped / 2000 == pytest.approx(0.2, abs=0.04)  # four standard errors


def test_a_comparison_has_one_outcome_wherever_it_occurs() -> None:
    noisy = with_label_noise(LENGTH, 0.5, seed=3)
    for i in range(40):
        (there,) = noisy([group("a", "bbb", prompt=str(i))])
        (back,) = noisy([group("bbb", "a", prompt=str(i))])
        assert there.rewards is not None
        assert back.rewards == there.rewards[::-1]


def test_another_seed_is_other_noise() -> None:
    groups = [group("a", "bbb", prompt=str(i)) for i in range(40)]
    one, other = (with_label_noise(LENGTH, 0.5, seed=seed)(groups) for seed in (0, 1))
    assert [g.rewards for g in one] != [g.rewards for g in other]


def test_a_completion_without_a_reward_gets_none() -> None:
    picky = scored(ScriptedScorer(lambda text: None if text == "bad" else float(len(text)), name="picky"))
    (two,) = with_label_noise(picky, 1.0)([group("bad", "a", "bbb")])
    assert two.rewards == (None, 1.0, 0.0)
    (one,) = with_label_noise(picky, 1.0)([group("bad", "a")])
    assert one.rewards == (None, None)  # nothing to compare with
