from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.annotate import judged, penalised, scored
from palate.errors import AnnotatorError
from palate.testing import ScriptedJudge, ScriptedScorer
from palate.types import Completion, Finish, Group, Prompt


def group(*texts: str, prompt: str = "Q", finish: Finish = "eos") -> Group:
    return Group(Prompt(prompt), tuple(Completion(t, (1,), finish) for t in texts))


def rewards_of(groups: Sequence[Group]) -> list[tuple[float | None, ...] | None]:
    return [g.rewards for g in groups]


LENGTH = ScriptedScorer(lambda text: float(len(text)), name="length")
VOWELS = ScriptedScorer(lambda text: float(sum(c in "aeiou" for c in text)), name="vowels")

# ---- scored ----------------------------------------------------------------------------------------


def test_one_reward_per_completion_in_order() -> None:
    found = scored(LENGTH)([group("a", "bbb"), group("cc")])
    assert rewards_of(found) == [(1.0, 3.0), (2.0,)]
    assert all(not g.parts for g in found)  # one reward has no parts to tell apart


def test_a_group_keeps_its_prompt_and_completions() -> None:
    before = group("a", "bbb", prompt="why?")
    (after,) = scored(LENGTH)([before])
    assert (after.prompt, after.completions) == (before.prompt, before.completions)
    assert before.rewards is None  # records are frozen: the caller's group is not changed


def test_weighted_sum_with_its_parts() -> None:
    (found,) = scored(LENGTH, VOWELS, weights=[0.5, -2.0])([group("aaa", "xx")])
    assert found.rewards == (0.5 * 3 - 2.0 * 3, 0.5 * 2)
    assert found.parts == {"length": (3.0, 2.0), "vowels": (3.0, 0.0)}  # unweighted


def test_weights_are_one_each_by_default() -> None:
    assert rewards_of(scored(LENGTH, VOWELS)([group("aaa", "xx")])) == [(6.0, 2.0)]


@pytest.mark.parametrize("unusable", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", [0, 1])
def test_no_usable_reward_from_any_scorer_is_none_from_all(unusable: float | None, position: int) -> None:
    # A sum with a part missing would rank this completion on other grounds than its neighbours.
    picky = ScriptedScorer(lambda text: unusable if text == "bad" else 1.0, name="picky")
    scorers = [LENGTH, LENGTH]
    scorers[position] = picky
    (found,) = scored(*scorers, weights=[1.0, 0.0])([group("bad", "xx")])
    assert found.rewards is not None
    assert found.rewards[0] is None  # also where the failing part would have counted nothing
    assert found.rewards[1] is not None
    assert found.parts["picky"] == (None, 1.0)


@pytest.mark.parametrize("weights", [[1.0, 2.0], [0.0, 1.0]])
def test_a_reward_that_abstains_for_a_prompt_is_left_out_of_its_sum(weights: list[float]) -> None:
    sums = ScriptedScorer(lambda text: None if text.startswith("r") else 5.0, name="sums")
    rhymes = ScriptedScorer(lambda text: 3.0 if text.startswith("r") else None, name="rhymes")
    lines: list[str] = []
    annotate = scored(sums, rhymes, weights=weights, say=lines.append)
    for _ in range(2):
        first, second = annotate([group("s1", "s2", prompt="a sum"), group("r1", "r2", prompt="a rhyme")])
        assert first.rewards == (5.0 * weights[0],) * 2
        assert second.rewards == (3.0 * weights[1],) * 2
        assert first.parts == {"sums": (5.0, 5.0), "rhymes": (None, None)}
    assert len(lines) == 2  # once per reward, with the first prompt
    assert "reward rhymes gave None to all completions of 'a sum'" in lines[0]
    assert "reward sums gave None to all completions of 'a rhyme'" in lines[1]


def test_where_all_rewards_abstain_there_is_none() -> None:
    silent = [ScriptedScorer(lambda text: None, name=name) for name in "ab"]
    lines: list[str] = []
    (found,) = scored(*silent, say=lines.append)([group("x", "y")])
    assert found.rewards == (None, None)
    assert lines == []  # the run warns of prompts without any reward


def test_a_reward_that_is_not_finite_does_not_abstain() -> None:
    broken = ScriptedScorer(lambda text: math.nan, name="broken")
    assert rewards_of(scored(LENGTH, broken)([group("x", "y")])) == [(None, None)]


def test_two_scorers_of_one_name_are_two() -> None:
    (found,) = scored(ScriptedScorer(len), ScriptedScorer(lambda text: 100.0))([group("aa")])  # type: ignore[arg-type]
    assert found.rewards == (102.0,)
    assert found.parts == {"scripted": (2.0,), "scripted (2)": (100.0,)}


def test_a_scorer_may_have_any_name() -> None:
    odd = ScriptedScorer(lambda text: 1.0, name="rewards")  # as a field of Group is called
    (found,) = scored(odd, LENGTH)([group("aa")])
    assert found.rewards == (3.0,)
    assert found.parts["rewards"] == (1.0,)


@pytest.mark.parametrize("unusable", [None, math.nan])
def test_nothing_usable_at_all_names_the_prompt(unusable: float | None) -> None:
    broken = ScriptedScorer(lambda text: unusable, name="broken")
    annotate = scored(broken, ScriptedScorer(lambda text: math.nan, name="other"))
    with pytest.raises(
        AnnotatorError, match=r"broken \+ other gave no usable reward .* 8 completions .*'why'"
    ):
        annotate([group("a", "b", prompt="why"), group(*"cdefgh")])


def test_of_a_few_completions_none_may_be_usable() -> None:
    (found,) = scored(ScriptedScorer(lambda text: None, name="broken"))([group(*"abcdefg")])
    assert found.rewards == (None,) * 7


def test_no_group_gives_no_group() -> None:
    assert scored(LENGTH)([]) == []


def test_no_scorer_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(AnnotatorError, match="no reward is given; name at least one, such as --reward"):
        scored()


def test_weights_must_match() -> None:
    with pytest.raises(AnnotatorError, match="1 weights were given for 2 rewards"):
        scored(LENGTH, VOWELS, weights=[1.0])


class Counting:
    """Gives a fixed number of rewards, whatever it is asked."""

    name = "counting"

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        return [1.0] * self.count


@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_wrong_number_of_rewards(count: int) -> None:
    with pytest.raises(AnnotatorError, match=f"counting gave {count} rewards for 2 completions"):
        scored(Counting(count))([group("a", "b")])


# ---- judged ----------------------------------------------------------------------------------------


def test_two_completions_get_p_and_its_rest() -> None:
    (found,) = judged(ScriptedJudge(lambda x, y: 0.75 if x == "a" else 0.25))([group("a", "b")])
    assert found.rewards == (0.75, 0.25)


@pytest.mark.parametrize("p", [0.0, 0.3, 0.7, 1.0])
def test_a_judge_that_favours_a_place_says_nothing(p: float) -> None:
    (found,) = judged(ScriptedJudge(lambda x, y: p))([group("a", "b", "c")])
    assert found.rewards == (0.5, 0.5, 0.5)


@given(st.floats(0, 1), st.floats(0, 1))
def test_swapping_the_two_gives_the_complement(p: float, q: float) -> None:
    judge = ScriptedJudge(lambda x, y: p if x == "a" else q)
    (found,) = judged(judge)([group("a", "b")])
    (swapped,) = judged(judge)([group("b", "a")])
    assert found.rewards == pytest.approx(((p + 1 - q) / 2, (q + 1 - p) / 2))
    assert swapped.rewards == pytest.approx(tuple(reversed(found.rewards or ())))


@pytest.mark.parametrize("missing", ["a", "b"])
def test_a_verdict_in_one_order_alone_is_none(missing: str) -> None:
    (found,) = judged(ScriptedJudge(lambda x, y: None if x == missing else 0.9))([group("a", "b")])
    assert found.rewards == (None, None)


def test_the_first_of_a_pair_is_the_one_preferred() -> None:
    (found,) = judged(ScriptedJudge(lambda a, b: 1.0 if a == "good" else 0.0))([group("bad", "good")])
    assert found.rewards == (0.0, 1.0)


def test_mean_win_probability_over_the_others() -> None:
    # Against a table: each pair is asked in both orders.
    table = {
        ("a", "b"): 0.9,
        ("b", "a"): 0.1,
        ("a", "c"): 0.6,
        ("c", "a"): 0.8,
        ("b", "c"): 0.5,
        ("c", "b"): 0.5,
    }
    (found,) = judged(ScriptedJudge(lambda x, y: table[x, y]))([group("a", "b", "c")])
    assert found.rewards == pytest.approx(((0.9 + 0.4) / 2, (0.1 + 0.5) / 2, (0.6 + 0.5) / 2))


def test_all_matches_of_all_groups_in_one_call() -> None:
    asked: list[tuple[str, str, str]] = []

    class Recording:
        name = "recording"

        def __call__(
            self, prompts: Sequence[Prompt], pairs: Sequence[tuple[Completion, Completion]]
        ) -> list[float | None]:
            assert not asked
            asked.extend((p.text, a.text, b.text) for p, (a, b) in zip(prompts, pairs, strict=True))
            return [0.5] * len(pairs)

    judged(Recording())([group("a", "b", prompt="P"), group(*"cde", prompt="R")])
    expected = [("P", "a", "b"), ("P", "b", "a"), *(("R", x, y) for x, y in itertools.permutations("cde", 2))]
    assert sorted(asked) == expected


@pytest.mark.parametrize("unusable", [None, math.nan, math.inf, -0.1, 1.1])
def test_an_unusable_verdict_counts_for_neither(unusable: float | None) -> None:
    # b has one usable match left; a and c have theirs against it, or none.
    verdicts = {("b", "c"): 0.8, ("c", "b"): 0.2}
    (found,) = judged(ScriptedJudge(lambda x, y: verdicts.get((x, y), unusable)))([group("a", "b", "c")])
    assert found.rewards == (None, pytest.approx(0.8), pytest.approx(0.2))


def test_no_usable_verdict_at_all_is_left_to_the_run() -> None:
    # It makes a step without pairs; a run stops after --max-dead-steps of those.
    (found,) = judged(ScriptedJudge(lambda a, b: None))([group(*"abcdefgh")])
    assert found.rewards == (None,) * 8


def test_a_wrong_number_of_verdicts() -> None:
    class Mute:
        name = "mute"

        def __call__(self, prompts: object, pairs: object) -> list[float | None]:
            return []

    with pytest.raises(AnnotatorError, match="judge mute gave 0 verdicts for 2 pairs"):
        judged(Mute())([group("a", "b")])


# ---- penalised -------------------------------------------------------------------------------------


def test_only_cut_completions_pay() -> None:
    completions = tuple(Completion("aa", (1,), finish) for finish in ("eos", "stop", "length"))
    annotate = penalised(scored(LENGTH), missing_eos=0.5)
    (found,) = annotate([Group(Prompt("Q"), completions)])
    assert found.rewards == (2.0, 2.0, 1.5)


def test_a_reward_that_is_missing_stays_missing() -> None:
    picky = ScriptedScorer(lambda text: None if text == "bad" else 1.0)
    (found,) = penalised(scored(picky), missing_eos=1.0)([group("bad", "ok", finish="length")])
    assert found.rewards == (None, 0.0)


def test_no_penalty_changes_nothing() -> None:
    annotate = scored(LENGTH)
    assert penalised(annotate, missing_eos=0.0) is annotate


@pytest.mark.parametrize("reward", [1e300, -1e300, 3.5e38])
def test_a_reward_beyond_float32_is_none(reward: float) -> None:
    (found,) = scored(ScriptedScorer(lambda text: reward if text == "a" else 1.0))([group("a", "b")])
    assert found.rewards == (None, 1.0)


def test_a_sum_beyond_float32_is_none() -> None:
    scorer = ScriptedScorer(lambda text: 1e38 if text == "a" else 1.0)
    (found,) = scored(scorer, weights=[1e10])([group("a", "b")])
    assert found.rewards == (None, 1e10)
