import itertools
import math
import pickle
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.select import Drop, Selected, best_vs_worst, pair_of_two, select_pairs
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


# ---- select_pairs ----------------------------------------------------------------------------------


def test_select_keeps_pairs_in_order_and_counts_the_rest() -> None:
    same = Group(Prompt("Q"), (completion("a"), completion("a")), (0.0, 1.0))
    groups = [group(a=1.0, b=0.0), group(a=1.0, b=1.0), group(c=0.0, d=1.0), group(a=None, b=0.0), same, same]
    selected = select_pairs(iter(groups), best_vs_worst)
    assert [texts(pair) for pair in selected.pairs] == [("a", "b"), ("d", "c")]
    assert selected.dropped == {Drop.TIE: 1, Drop.UNUSABLE: 1, Drop.IDENTICAL: 2}
    assert pickle.loads(pickle.dumps(selected)) == selected


def test_select_of_nothing_counts_zero_of_every_reason() -> None:
    assert select_pairs([], best_vs_worst) == Selected((), dict.fromkeys(Drop, 0))
    assert {reason.value for reason in Drop} == {"tie", "identical", "unusable"}


def test_select_takes_any_rule() -> None:
    def first_two(group: Group) -> Pair:
        return Pair(group.prompt, group.completions[0], group.completions[1])

    selected = select_pairs([group(a=0.0, b=1.0, c=2.0)], first_two)
    assert [texts(pair) for pair in selected.pairs] == [("a", "b")]
    assert selected.pairs[0].margin is None


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
