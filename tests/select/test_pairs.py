import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.select import (
    Drop,
    Selected,
    all_pairs,
    best_vs_worst,
    by_likelihood_rank,
    distinct,
    pair_of_two,
    select_pairs,
)
from palate.types import Completion, Group, Pair, Prompt

RULES = pytest.mark.parametrize("rule", [best_vs_worst, pair_of_two])


def completion(text: str) -> Completion:
    """Its tokens are its characters."""
    return Completion(text, tuple(map(ord, text)))


def group(**rewards: float | None) -> Group:
    """A group whose texts are the keywords."""
    completions = tuple(map(completion, rewards))
    return Group(Prompt("Q", where="prompts.jsonl:12"), completions, tuple(rewards.values()))


def texts(made: Pair | Drop) -> tuple[str, str]:
    assert isinstance(made, Pair)
    return made.chosen.text, made.rejected.text


def drops(**counts: int) -> dict[Drop, int]:
    """Every reason, with 0 where none is given."""
    return dict.fromkeys(Drop, 0) | {Drop(reason): count for reason, count in counts.items()}


# ---- best_vs_worst ---------------------------------------------------------------------------------


def test_highest_against_lowest() -> None:
    made = best_vs_worst(group(a=0.5, b=2.0, c=-1.0, d=1.0))
    assert made == Pair(Prompt("Q"), completion("b"), completion("c"), margin=3.0)


def test_first_of_equals_is_taken() -> None:
    assert texts(best_vs_worst(group(a=0.0, b=1.0, c=0.0, d=1.0))) == ("b", "a")


@RULES
@pytest.mark.parametrize("unusable", [None, math.nan, math.inf, -math.inf])
def test_fewer_than_two_usable_rewards(rule: Callable[..., Pair | Drop], unusable: float | None) -> None:
    assert rule(group(a=1.0, b=unusable)) is Drop.UNUSABLE
    assert rule(group(a=unusable, b=unusable)) is Drop.UNUSABLE


@pytest.mark.parametrize("unusable", [None, math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("position", range(4))
def test_unusable_completion_is_never_in_a_pair(unusable: float | None, position: int) -> None:
    rewards: list[tuple[str, float | None]] = [("a", 1.0), ("b", 3.0), ("c", 2.0)]
    rewards.insert(position, ("x", unusable))
    made = best_vs_worst(group(**dict(rewards)))
    assert texts(made) == ("b", "a")
    assert isinstance(made, Pair)
    assert made.margin == 2.0


def test_group_of_none_or_one_is_unusable() -> None:
    assert best_vs_worst(group()) is Drop.UNUSABLE
    assert best_vs_worst(group(a=1.0)) is Drop.UNUSABLE


@RULES
def test_tie_is_at_most_the_given_difference(rule: Callable[..., Pair | Drop]) -> None:
    assert rule(group(a=1.0, b=1.0)) is Drop.TIE
    assert rule(group(a=1.0, b=1.25), tie=0.25) is Drop.TIE
    assert rule(group(a=1.25, b=1.0), tie=0.25) is Drop.TIE
    assert texts(rule(group(a=1.0, b=1.25), tie=0.125)) == ("b", "a")
    assert texts(rule(group(a=1.0, b=1.0 + 2**-40))) == ("b", "a")


def test_tie_spans_the_whole_group() -> None:
    assert best_vs_worst(group(a=1.0, b=1.2, c=1.4), tie=0.3) != Drop.TIE
    assert best_vs_worst(group(a=1.0, b=1.2, c=1.4), tie=0.5) is Drop.TIE


@pytest.mark.parametrize("rewards", [(1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Completion("yes", (1, 2)), Completion("yes", (1, 2))),
        (Completion("yes", (1, 2)), Completion(" yes\n", (3, 2))),  # the same text in other tokens
        (Completion("", (7,)), Completion("  ", (8,))),
        (Completion("yes", (1, 2)), Completion("yes", (1,), finish="length")),
        (Completion("a", (5,)), Completion("b", (5,))),  # the same tokens decide as well
    ],
)
def test_identical_whatever_the_rewards(
    first: Completion, second: Completion, rewards: tuple[float, float]
) -> None:
    assert best_vs_worst(Group(Prompt("Q"), (first, second), rewards)) is Drop.IDENTICAL
    assert pair_of_two(Group(Prompt("Q"), (first, second), rewards), tie=9.0) is Drop.IDENTICAL


def test_texts_that_differ_inside_are_not_identical() -> None:
    completions = (Completion("a  b", (1,)), Completion("a b", (2,)))
    assert texts(best_vs_worst(Group(Prompt("Q"), completions, (0.0, 1.0)))) == ("a b", "a  b")


def test_among_worst_ones_the_first_that_differs_is_rejected() -> None:
    a, b = completion("a"), completion("b")
    assert texts(best_vs_worst(Group(Prompt("Q"), (a, a, b), (1.0, 0.0, 0.0)))) == ("a", "b")
    assert best_vs_worst(Group(Prompt("Q"), (a, b, a), (1.0, 0.5, 0.0))) is Drop.IDENTICAL


def test_equal_rewards_are_a_tie_unless_all_texts_are_the_same() -> None:
    a, b = completion("a"), completion("b")
    assert best_vs_worst(Group(Prompt("Q"), (a, a, b), (1.0, 1.0, 1.0))) is Drop.TIE
    assert best_vs_worst(Group(Prompt("Q"), (a, a, a), (1.0, 1.0, 1.0))) is Drop.IDENTICAL


@given(
    rewards=st.lists(st.one_of(st.none(), st.floats(-10, 10), st.just(math.nan)), max_size=6),
    tie=st.floats(0, 5),
)
def test_pair_spans_the_usable_rewards(rewards: list[float | None], tie: float) -> None:
    usable = [r for r in rewards if r is not None and not math.isnan(r)]
    made = best_vs_worst(group(**dict(zip("abcdef", rewards, strict=False))), tie=tie)
    if len(usable) < 2:
        assert made is Drop.UNUSABLE
    elif all(abs(r - s) <= tie for r, s in itertools.combinations(usable, 2)):
        assert made is Drop.TIE
    else:
        assert isinstance(made, Pair)
        assert made.margin == max(usable) - min(usable)
        assert rewards["abcdef".index(made.chosen.text)] == max(usable)
        assert rewards["abcdef".index(made.rejected.text)] == min(usable)


@given(
    rewards=st.lists(st.floats(-10, 10), min_size=2, max_size=6, unique=True),
    order=st.permutations(range(6)),
)
def test_order_in_the_group_matters_only_among_equals(rewards: list[float], order: list[int]) -> None:
    scored = list(zip("abcdef", rewards, strict=False))
    shuffled = [scored[i] for i in order if i < len(scored)]
    assert best_vs_worst(group(**dict(shuffled))) == best_vs_worst(group(**dict(scored)))


# ---- pair_of_two -----------------------------------------------------------------------------------


def test_pair_of_two_puts_the_better_first() -> None:
    for made in (pair_of_two(group(a=0.25, b=0.75)), pair_of_two(group(b=0.75, a=0.25))):
        assert made == Pair(Prompt("Q"), completion("b"), completion("a"), margin=0.5)


@pytest.mark.parametrize("n", [0, 1, 3])
def test_pair_of_two_takes_two(n: int) -> None:
    with pytest.raises(ValueError, match=rf"prompts.jsonl:12 has {n} completions, expected 2"):
        pair_of_two(group(**dict(zip("abc"[:n], (1.0, 2.0, 3.0), strict=False))))


# ---- all_pairs -------------------------------------------------------------------------------------


def test_all_pairs_of_unlike_reward() -> None:
    made = all_pairs(group(a=1.0, b=3.0, c=None, d=1.0, e=2.0))
    # of ab, ad, ae, bd, be, de the tie ad is left out; each of the four has no pair with c
    assert [texts(pair) for pair in made.pairs] == [
        ("b", "a"),
        ("e", "a"),
        ("b", "d"),
        ("b", "e"),
        ("e", "d"),
    ]
    assert [pair.margin for pair in made.pairs] == [2.0, 1.0, 2.0, 1.0, 1.0]
    assert made.dropped == drops(tie=1, unusable=4)


def test_all_pairs_leave_out_ties_and_identical_ones() -> None:
    a, b = completion("a"), completion("b")
    made = all_pairs(Group(Prompt("Q"), (a, a, b), (1.0, 0.5, 0.0)), tie=0.5)
    assert [texts(pair) for pair in made.pairs] == [("a", "b")]
    assert made.dropped == drops(identical=1, tie=1)
    once = all_pairs(distinct(Group(Prompt("Q"), (a, a, b), (1.0, 0.5, 0.0))))
    assert [pair.margin for pair in once.pairs] == [1.0]


@pytest.mark.parametrize("texts_of_group", ["", "a"])
def test_all_pairs_of_too_few_are_none(texts_of_group: str) -> None:
    assert all_pairs(group(**dict.fromkeys(texts_of_group, 1.0))) == Selected((), drops())


@given(
    rewards=st.lists(st.one_of(st.none(), st.sampled_from([0.0, 0.5, 1.0, math.nan])), max_size=6),
    tie=st.sampled_from([0.0, 0.5]),
)
def test_all_pairs_are_counted_or_kept(rewards: list[float | None], tie: float) -> None:
    by_text = dict(zip("abcdef", rewards, strict=False))
    made = all_pairs(group(**by_text), tie=tie)
    assert len(made.pairs) + sum(made.dropped.values()) == math.comb(len(rewards), 2)
    expected = {
        (a, b)
        for a, b in itertools.permutations(by_text, 2)
        if (r := by_text[a]) is not None and (s := by_text[b]) is not None and r - s > tie
    }
    assert {texts(pair) for pair in made.pairs} == expected


# ---- by_likelihood_rank ----------------------------------------------------------------------------

# Ranked from the likeliest: N -2, p -4, n -5, q -7, m -8, r -10; rewards above 0.5 for p, q and r.
RANKED: dict[str, float | None] = {"p": 0.9, "m": 0.1, "q": 0.8, "N": 0.0, "r": 1.0, "n": 0.5}
LOGPS = (-4.0, -8.0, -7.0, -2.0, -10.0, -5.0)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        # p is below N alone, q below n and N, r below m, n and N
        ({}, ["pN", "qn", "rm"]),
        ({"partner": "farthest"}, ["pN", "qN", "rN"]),
        ({"partner": "all"}, ["pN", "qN", "qn", "rm", "rN", "rn"]),
        # p is above n and m, q above m, r above none
        ({"direction": "below"}, ["pn", "qm"]),
        ({"direction": "below", "partner": "farthest"}, ["pm", "qm"]),
        # p: n at 1 before N at 2; q: m at 1 before n at 2; r: m at 2. Farthest: m at 4, N at 5, N at 8.
        ({"direction": "either"}, ["pn", "qm", "rm"]),
        ({"direction": "either", "partner": "farthest"}, ["pm", "qN", "rN"]),
        ({"direction": "either", "partner": "all"}, ["pm", "pN", "pn", "qm", "qN", "qn", "rm", "rN", "rn"]),
    ],
)
def test_partners_by_rank(options: dict[str, Any], expected: list[str]) -> None:
    made = by_likelihood_rank(group(**RANKED), threshold=0.5, logps=LOGPS, **options)
    assert ["".join(texts(pair)) for pair in made.pairs] == expected
    without = 3 - len({pair.chosen for pair in made.pairs})
    assert made.dropped == drops(passed_over=without)


def test_rank_pairs_carry_prompt_and_margin() -> None:
    made = by_likelihood_rank(group(**RANKED), threshold=0.5, logps=LOGPS)
    assert made.pairs[0] == Pair(Prompt("Q"), completion("p"), completion("N"), margin=0.9)


def test_ranks_are_those_of_sampling_unless_given() -> None:
    def sampled(text: str, *logps: float) -> Completion:
        return Completion(text, (1, 2), logps=logps)

    p, n, m = sampled("p", -3.0, -1.0), sampled("n", -1.0, -2.5), sampled("m", -0.5, -0.5)
    p, n, m = (Completion(c.text, (i, 2), logps=c.logps) for i, c in enumerate((p, n, m)))
    made = by_likelihood_rank(Group(Prompt("Q"), (p, m, n), (1.0, 0.0, 0.0)), threshold=0.0)
    assert [texts(pair) for pair in made.pairs] == [("p", "n")]  # sums -4, -1, -3.5
    given_ones = by_likelihood_rank(
        Group(Prompt("Q"), (p, m, n), (1.0, 0.0, 0.0)), threshold=0.0, logps=(-4.0, -3.0, -2.0)
    )
    assert [texts(pair) for pair in given_ones.pairs] == [("p", "m")]


def test_equally_likely_is_neither_above_nor_below() -> None:
    level = group(p=1.0, n=0.0, m=0.0)
    for direction in ("above", "below"):
        made = by_likelihood_rank(level, threshold=0.5, logps=(-1.0,) * 3, direction=direction)  # type: ignore[arg-type]
        assert made == Selected((), drops(passed_over=1))
    made = by_likelihood_rank(level, threshold=0.5, logps=(-1.0,) * 3, direction="either")
    assert [texts(pair) for pair in made.pairs] == [("p", "n")]  # the first of equally near ones


def test_rank_pairs_leave_out_the_unusable_and_the_identical() -> None:
    p, n = completion("p"), completion("n")
    unusable = group(p=1.0, x=None, y=math.nan, n=0.0)
    made = by_likelihood_rank(unusable, threshold=0.5, logps=(-5.0, -4.0, -3.0, -1.0))
    assert [texts(pair) for pair in made.pairs] == [("p", "n")]
    assert made.dropped == drops(unusable=2)
    # A positive repeated among the negatives is no partner; the next one is.
    repeated = Group(Prompt("Q"), (p, p, n), (1.0, 0.0, 0.0))
    made = by_likelihood_rank(repeated, threshold=0.5, logps=(-5.0, -4.0, -3.0))
    assert [texts(pair) for pair in made.pairs] == [("p", "n")]
    made = by_likelihood_rank(repeated, threshold=0.5, logps=(-5.0, -4.0, -6.0))
    assert made == Selected((), drops(identical=1))


def test_rank_needs_both_kinds() -> None:
    logps = (-1.0, -2.0)
    assert by_likelihood_rank(group(p=1.0, q=1.0), threshold=0.5, logps=logps).dropped == drops(passed_over=2)
    assert by_likelihood_rank(group(n=0.0, m=0.0), threshold=0.5, logps=logps) == Selected((), drops())


@given(
    rewards=st.lists(st.booleans(), min_size=1, max_size=6),
    order=st.permutations([-1.0, -2.0, -3.5, -6.0, -6.5, -9.0]),
)
def test_rank_pairs_are_in_the_wrong_order_and_nearest(rewards: list[bool], order: list[float]) -> None:
    by_text = dict(zip("abcdef", map(float, rewards), strict=False))
    ranks = dict(zip("abcdef", order, strict=True))
    made = by_likelihood_rank(group(**by_text), threshold=0.5, logps=[ranks[text] for text in by_text])
    for better, worse in map(texts, made.pairs):
        assert by_text[better] > by_text[worse]
        assert ranks[worse] > ranks[better]
        between = [t for t in by_text if ranks[better] < ranks[t] < ranks[worse]]
        assert all(by_text[t] for t in between)  # a negative in between would have been nearer
    assert len(made.pairs) + made.dropped[Drop.PASSED_OVER] == sum(rewards)


def test_logps_are_checked() -> None:
    with pytest.raises(ValueError, match=r"prompts.jsonl:12 has completions without log-probabilities"):
        by_likelihood_rank(group(a=1.0, b=0.0), threshold=0.5)
    with pytest.raises(ValueError, match=r"1 logps were given for 2 completions of .*prompts.jsonl:12"):
        by_likelihood_rank(group(a=1.0, b=0.0), threshold=0.5, logps=[-1.0])
    with pytest.raises(
        ValueError, match=r"log-probability of .*prompts.jsonl:12 is not finite: \[-1.0, nan\]"
    ):
        by_likelihood_rank(group(a=1.0, b=0.0), threshold=0.5, logps=[-1.0, math.nan])


# ---- select_pairs ----------------------------------------------------------------------------------


def test_select_keeps_pairs_in_order_and_counts_the_rest() -> None:
    same = Group(Prompt("Q"), (completion("a"), completion("a")), (0.0, 1.0))
    groups = [group(a=1.0, b=0.0), group(a=1.0, b=1.0), group(c=0.0, d=1.0), group(a=None, b=0.0), same, same]
    selected = select_pairs(iter(groups), best_vs_worst)
    assert [texts(pair) for pair in selected.pairs] == [("a", "b"), ("d", "c")]
    assert selected.dropped == drops(tie=1, unusable=1, identical=2)
    assert pickle.loads(pickle.dumps(selected)) == selected


def test_select_of_nothing_counts_zero_of_every_reason() -> None:
    assert select_pairs([], best_vs_worst) == Selected((), dict.fromkeys(Drop, 0))
    assert {reason.value for reason in Drop} == {"tie", "identical", "unusable", "passed_over"}


def test_select_takes_any_rule() -> None:
    def first_two(group: Group) -> Pair:
        return Pair(group.prompt, group.completions[0], group.completions[1])

    selected = select_pairs([group(a=0.0, b=1.0, c=2.0)], first_two)
    assert [texts(pair) for pair in selected.pairs] == [("a", "b")]
    assert selected.pairs[0].margin is None


def test_select_adds_up_rules_of_many_pairs() -> None:
    groups = [group(a=2.0, b=1.0, c=1.0), group(d=0.0, e=1.0), group(f=None, g=1.0)]
    selected = select_pairs(groups, all_pairs)
    assert [texts(pair) for pair in selected.pairs] == [("a", "b"), ("a", "c"), ("e", "d")]
    assert selected.dropped == drops(tie=1, unusable=1)


# ---- Errors ----------------------------------------------------------------------------------------


def test_group_without_rewards_is_an_error() -> None:
    bare = Group(Prompt("Q", where="prompts.jsonl:12"), (completion("a"), completion("b")))
    message = r"the group of prompt prompts.jsonl:12 has no rewards"
    with pytest.raises(ValueError, match=message):
        best_vs_worst(bare)
    with pytest.raises(ValueError, match=message):
        pair_of_two(bare)
    with pytest.raises(ValueError, match=message):
        select_pairs([bare], lambda group: Drop.TIE)
    with pytest.raises(ValueError, match=Prompt("Q").id):  # named by its key where nothing else is known
        best_vs_worst(Group(Prompt("Q"), (completion("a"),)))


@RULES
@pytest.mark.parametrize("tie", [-0.1, math.nan, math.inf])
def test_tie_is_not_negative(rule: Callable[..., Pair | Drop], tie: float) -> None:
    with pytest.raises(ValueError, match=f"tie is {tie}, expected a finite number, 0 or above"):
        rule(group(a=0.0, b=1.0), tie=tie)
