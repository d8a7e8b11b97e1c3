import itertools
import math
from collections import Counter
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from palate.errors import AnnotatorError
from palate.select import Drop, Selected, first_round_pairs, pair_of_two, select_pairs, tournament_pairs
from palate.types import Completion, Group, Pair, Prompt

STRENGTH = {text: float(i) for i, text in enumerate("abcdefghijklmnopqrstuvwxyz")}


def group(texts: str, rewards: Sequence[float | None] | None = None, prompt: str = "Q") -> Group:
    """A group with a completion for each letter; its tokens are its characters."""
    completions = tuple(Completion(text, (ord(text),)) for text in texts)
    return Group(Prompt(prompt), completions, None if rewards is None else tuple(rewards))


def texts(of: Group | Pair) -> str:
    return "".join(c.text for c in of.completions)


def drops(**counts: int) -> dict[Drop, int]:
    return dict.fromkeys(Drop, 0) | {Drop(reason): count for reason, count in counts.items()}


class Ranker:
    """Prefers the later letter, and remembers what it was asked in each call."""

    def __init__(self, strength: dict[str, float | None] | None = None) -> None:
        self.strength = STRENGTH | (strength or {})
        self.calls: list[list[str]] = []

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        self.calls.append([texts(g) for g in groups])
        return [g.annotated(tuple(self.strength[c.text] for c in g.completions)) for g in groups]


# ---- first_round_pairs -----------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "pairs"), [(0, 0), (1, 0), (2, 1), (5, 2), (8, 4)])
def test_first_round_is_disjoint(n: int, pairs: int) -> None:
    twos = first_round_pairs(group("abcdefgh"[:n]), Random(1))
    assert [len(two.completions) for two in twos] == [2] * pairs
    assert len({c for two in twos for c in two.completions}) == 2 * pairs
    assert all(two.prompt == Prompt("Q") and two.rewards is None for two in twos)


def test_first_round_keeps_rewards_to_be_labelled_by() -> None:
    rewards = (0.0, 1.0, 2.0, 3.0)
    before = group("abcd").annotated(rewards, part=(5.0, 6.0, 7.0, 8.0))
    for two in first_round_pairs(before, Random(2)):
        positions = ["abcd".index(c.text) for c in two.completions]
        assert two.rewards == tuple(rewards[i] for i in positions)
        assert two.parts == {"part": tuple(5.0 + i for i in positions)}
    selected = select_pairs(first_round_pairs(before, Random(2)), pair_of_two)
    assert len(selected.pairs) == 2
    assert all(pair.chosen.text > pair.rejected.text for pair in selected.pairs)


def test_first_round_is_annotated_after_the_draw() -> None:
    twos = first_round_pairs(group("abcd"), Random(3))
    selected = select_pairs(Ranker()(twos), pair_of_two)
    assert [set(texts(pair)) for pair in selected.pairs] == [set(texts(two)) for two in twos]


def test_first_round_draws_all_matchings_alike() -> None:
    # Four completions can be matched in three ways, each pair in either order, the pairs in either order.
    rng, n = Random(4), 12_000
    found = Counter(" ".join(map(texts, first_round_pairs(group("abcd"), rng))) for _ in range(n))
    assert len(found) == math.factorial(4)
    assert stats.chisquare(list(found.values())).pvalue > 1e-3


def test_first_round_is_its_seeds() -> None:
    def run(seed: int) -> list[str]:
        return [texts(two) for two in first_round_pairs(group("abcdefgh"), Random(seed))]

    assert run(1) == run(1)
    assert run(1) != run(2)


# ---- tournament_pairs ------------------------------------------------------------------------------


@pytest.mark.parametrize("n", range(10))
@pytest.mark.parametrize("seed", range(3))
def test_tournament_of_one_group(n: int, seed: int) -> None:
    ranker = Ranker()
    selected = tournament_pairs([group("abcdefghi"[:n])], ranker, rng=Random(seed))
    assert len(selected.pairs) == max(0, n - 1)
    assert selected.dropped == drops()
    assert len(ranker.calls) == (math.ceil(math.log2(n)) if n else 0)
    assert sum(map(len, ranker.calls)) == max(0, n - 1)
    if n > 1:
        assert selected.pairs[-1].chosen.text == "abcdefghi"[n - 1]  # the best wins the final
        # Everyone but the best loses once.
        assert sorted(pair.rejected.text for pair in selected.pairs) == list("abcdefghi"[: n - 1])


def test_tournament_by_hand() -> None:
    # Keys 0.5, 0.1, 0.9, 0.3, 0.7 draw b d a e c: b-d and a-e, while c sits out. Then c plays first, c-d, and
    # e sits out. Then e-d.
    class Drawn(Random):
        keys = iter((0.5, 0.1, 0.9, 0.3, 0.7))

        def random(self) -> float:
            return next(self.keys)

    ranker = Ranker()
    selected = tournament_pairs([group("abcde")], ranker, rng=Drawn())
    assert ranker.calls == [["bd", "ae"], ["cd"], ["ed"]]
    assert [texts(pair) for pair in selected.pairs] == ["db", "ea", "dc", "ed"]
    assert [pair.margin for pair in selected.pairs] == [2.0, 4.0, 1.0, 1.0]


def test_one_round_of_all_groups_is_one_call() -> None:
    ranker = Ranker()
    groups = [
        group("abcd", prompt="1"),
        group("e", prompt="2"),
        group("fg", prompt="3"),
        group("hijklm", prompt="4"),
    ]
    selected = tournament_pairs(groups, ranker, rng=Random(5))
    assert [len(call) for call in ranker.calls] == [2 + 1 + 3, 1 + 1, 1]  # no longer than the largest group's
    # Pairs come group by group, whatever the round.
    assert [pair.prompt.content for pair in selected.pairs] == ["1"] * 3 + ["3"] + ["4"] * 5
    assert all(pair.chosen.text > pair.rejected.text for pair in selected.pairs)


def test_nothing_to_play_is_no_call() -> None:
    ranker = Ranker()
    for groups in ([], [group("")], [group("a"), group("b")]):
        assert tournament_pairs(groups, ranker, rng=Random(6)) == Selected((), drops())
    assert ranker.calls == []


def test_tournament_by_rewards_that_are_there() -> None:
    scored = group("abcd", (4.0, 3.0, 2.0, 1.0))
    selected = tournament_pairs([scored], list, rng=Random(7))
    assert len(selected.pairs) == 3
    assert selected.pairs[-1].chosen.text == "a"


@given(
    sizes=st.lists(st.integers(0, 9), max_size=4),
    strength=st.lists(st.sampled_from([None, math.nan, 0.0, 0.5, 2.0, 2.25]), min_size=9, max_size=9),
    tie=st.sampled_from([0.0, 0.25, 1.0]),
    seed=st.integers(0, 99),
)
def test_every_match_is_a_pair_or_counted(
    sizes: list[int], strength: list[float | None], tie: float, seed: int
) -> None:
    ranker = Ranker(dict(zip("abcdefghi", strength, strict=True)))
    selected = tournament_pairs([group("abcdefghi"[:n]) for n in sizes], ranker, rng=Random(seed), tie=tie)
    assert len(selected.pairs) + sum(selected.dropped.values()) == sum(max(0, n - 1) for n in sizes)
    assert all(pair.margin is not None and pair.margin > tie for pair in selected.pairs)
    assert len(ranker.calls) == max((math.ceil(math.log2(n)) for n in sizes if n), default=0)


# ---- Matches without a pair ------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(8))
def test_the_usable_one_goes_on(seed: int) -> None:
    # Whoever meets x gains nothing, but goes on: the final is the best's unless x was in it.
    selected = tournament_pairs([group("axb")], Ranker({"x": None}), rng=Random(seed))
    assert selected.dropped == drops(unusable=1)
    assert [texts(pair) for pair in selected.pairs] == ["ba"]


@pytest.mark.parametrize("seed", range(8))
def test_the_higher_of_a_tie_goes_on(seed: int) -> None:
    # b and c tie, a is far behind. c never loses to b, so that a is beaten by c, or by b before b meets c.
    selected = tournament_pairs([group("abc")], Ranker({"b": 5.0, "c": 5.2}), rng=Random(seed), tie=0.5)
    assert selected.dropped == drops(tie=1)
    assert [texts(pair)[1] for pair in selected.pairs] == ["a"]
    drawn = tournament_pairs(
        [group("bcz")], Ranker({"b": 5.0, "c": 5.2, "z": 9.0}), rng=Random(seed), tie=0.5
    )
    met = [pair for pair in drawn.pairs if texts(pair) == "zb"]
    assert len(drawn.pairs) + drawn.dropped[Drop.TIE] == 2
    assert not (met and drawn.dropped[Drop.TIE])  # after a tie of b and c, z meets c


@pytest.mark.parametrize("strength", [None, 1.0, math.nan])
def test_where_rewards_say_nothing_either_goes_on(strength: float | None) -> None:
    # a and b are alike and z beats both: who of them plays z is by the draw, each as often.
    met: Counter[str] = Counter()
    for seed in range(400):
        ranker = Ranker({"a": strength, "b": strength, "z": 2.0})
        tournament_pairs([group("abz")], ranker, rng=Random(seed))
        (first,), (final,) = ranker.calls
        if "z" not in first:
            met[final.replace("z", "")] += 1
            assert first[0] in final
    assert stats.binomtest(met["a"], met.total()).pvalue > 1e-3
    assert met.keys() == {"a", "b"}


def test_the_same_are_not_annotated() -> None:
    ranker = Ranker()
    selected = tournament_pairs([group("aa"), group("bbbb"), group("cd")], ranker, rng=Random(8))
    assert ranker.calls == [["cd"]] or ranker.calls == [["dc"]]
    assert [texts(pair) for pair in selected.pairs] == ["dc"]
    assert selected.dropped == drops(identical=4)
    assert tournament_pairs([group("bbbb")], ranker, rng=Random(8)).dropped == drops(identical=3)
    assert len(ranker.calls) == 1


def test_one_seed_one_tournament() -> None:
    def run(seed: int) -> list[str]:
        return [
            texts(pair) for pair in tournament_pairs([group("abcdefgh")], Ranker(), rng=Random(seed)).pairs
        ]

    assert run(1) == run(1)
    assert run(1) != run(2)


def test_the_draw_is_uniform() -> None:
    rng, n = Random(9), 6000
    met = Counter[str]()
    for _ in range(n):
        ranker = Ranker()
        tournament_pairs([group("abcd")], ranker, rng=rng)
        met.update("".join(sorted(two)) for two in ranker.calls[0])
    # Each of the six pairs meets in the first round of every third draw.
    assert met.keys() == {"".join(two) for two in itertools.combinations("abcd", 2)}
    for count in met.values():
        assert stats.binomtest(count, n, 1 / 3).pvalue > 1e-3


# ---- Errors ----------------------------------------------------------------------------------------


def test_an_annotator_gives_one_group_each() -> None:
    with pytest.raises(AnnotatorError, match="the annotator returned 1 groups for 2; expected one each"):
        tournament_pairs([group("abcd")], lambda groups: Ranker()(groups)[:1], rng=Random(0))


def test_an_annotator_gives_rewards() -> None:
    with pytest.raises(ValueError, match="has no rewards"):
        tournament_pairs([group("ab")], list, rng=Random(0))


@pytest.mark.parametrize("tie", [-0.1, math.nan, math.inf])
def test_tie_is_not_negative(tie: float) -> None:
    with pytest.raises(ValueError, match=f"tie is {tie}, expected a finite number, 0 or above"):
        tournament_pairs([], Ranker(), rng=Random(0), tie=tie)
