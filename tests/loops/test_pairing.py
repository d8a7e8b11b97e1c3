from __future__ import annotations

from collections.abc import Sequence
from random import Random

import pytest

from palate.annotate import scored
from palate.loops.pairing import drawn_pairs, paired, with_best
from palate.select import Drop
from palate.testing import ScriptedScorer
from palate.types import AnchoredPair, Completion, Group, Pair, Prompt


def group(*texts: str, name: str = "q") -> Group:
    """Completions of one letter, whose place in the alphabet is what they are worth."""
    return Group(Prompt(name), tuple(Completion(text, tuple(map(ord, text))) for text in texts))


def worth(text: str) -> float:
    return float(ord(text[0]) - ord("a"))


score = scored(ScriptedScorer(worth))


class Asked:
    """An annotator that keeps what it was asked."""

    def __init__(self, annotate=score) -> None:  # type: ignore[no-untyped-def]
        self.annotate, self.calls = annotate, []  # type: ignore[var-annotated]

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        self.calls.append(list(groups))
        found: list[Group] = self.annotate(groups)
        return found


# ---- Pairs -----------------------------------------------------------------------------------------


def test_by_scores_nobody_is_asked_again() -> None:
    groups = score([group("a", "c", "b", "d"), group("f", "e")])
    asked = Asked()
    for pairing in ("tournament", "first-round", "drawn", "best-vs-worst"):
        pairs, _ = paired(groups, asked, pairing=pairing, tie=0.0, rng=Random(0))  # type: ignore[arg-type]
        assert pairs
        assert all(worth(p.chosen.text) > worth(p.rejected.text) for p in pairs)
    assert asked.calls == []


def test_a_tournament_by_comparisons_asks_once_a_round() -> None:
    # 5 play 2 + 1 + 1 matches in 3 rounds, 2 play one in the first.
    asked = Asked()
    groups = [group("a", "c", "b", "d", "e"), group("f", "g")]
    pairs, _ = paired(groups, asked, pairing="tournament", ask="comparisons", tie=0.0, rng=Random(0))
    assert [len(call) for call in asked.calls] == [3, 1, 1]
    assert all(len(match.completions) == 2 for call in asked.calls for match in call)
    assert len(pairs) == 5


def test_a_first_round_by_comparisons_asks_once() -> None:
    asked = Asked()
    groups = [group("a", "c", "b", "d", "e"), group("f", "g")]
    pairs, dropped = paired(groups, asked, pairing="first-round", ask="comparisons", tie=0.0, rng=Random(0))
    assert [len(call) for call in asked.calls] == [3]  # of 5, one finds no partner
    assert len(pairs) == 3
    assert dropped[Drop.PASSED_OVER] == 1


def test_nothing_is_asked_about_nothing() -> None:
    asked = Asked()
    for pairing in ("first-round", "tournament"):
        made = paired([group("a")], asked, pairing=pairing, ask="comparisons", tie=0.0, rng=Random(0))  # type: ignore[arg-type]
        assert made.pairs == ()
    assert asked.calls == []


def test_as_many_pairs_are_drawn_as_there_are_completions() -> None:
    # 4 completions make 6 pairs, one of which ties here.
    (scores,) = score([group("a", "b", "c", "c!")])
    pairs, dropped = drawn_pairs(scores, tie=0.0, rng=Random(0))
    assert len(pairs) == 4
    assert (dropped[Drop.PASSED_OVER], dropped[Drop.TIE]) == (1, 1)
    assert len(set(pairs)) == 4


def test_every_pair_is_drawn_as_often_as_any_other() -> None:
    # 5 of 10 pairs: each with probability 1/2; of 2000 draws, 4 standard errors are 4 sqrt(2000 / 4) = 89.
    (scores,) = score([group("a", "b", "c", "d", "e")])
    rng = Random(1)
    count: dict[Pair, int] = {}
    for _ in range(2000):
        for pair in drawn_pairs(scores, tie=0.0, rng=rng).pairs:
            count[pair] = count.get(pair, 0) + 1
    assert len(count) == 10
    assert all(abs(times - 1000) < 89 for times in count.values())


# ---- Anchors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("ask", ["scores", "comparisons"])
def test_the_best_of_a_group_is_the_anchor_of_all_its_pairs(seed: int, ask: str) -> None:
    groups = [group("a", "d", "b", "c", "e"), group("c", "a", "b", name="r")]
    known = score(groups) if ask == "scores" else groups
    pairs, _ = paired(known, score, pairing="tournament", ask=ask, tie=0.0, rng=Random(seed))  # type: ignore[arg-type]
    records = with_best(pairs, known)
    best = {"q": "e", "r": "c"}
    for pair, record in zip(pairs, records, strict=True):
        if isinstance(record, AnchoredPair):
            assert (record.pair, record.anchor.text) == (pair, best[pair.prompt.text])
            assert pair.chosen.text != best[pair.prompt.text]
        else:  # it is its own
            assert record.chosen.text == best[pair.prompt.text]
