from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.annotate.judges.desk import Desk
from palate.annotate.judges.judging import Bench
from palate.annotate.judges.reading import read_points
from palate.annotate.judges.records import POINTS, Amount, Question, Verdict
from palate.annotate.judges.template import Template
from palate.data.ranked import Ranking
from palate.errors import DataError
from palate.making.eft import (
    Asking,
    Grading,
    Made,
    agreeing,
    balanced,
    divided,
    from_gold,
    levels,
    orderable,
    orders_alike,
)
from palate.types import Prompt

RUBRIC = Asking(Template.load("rubric"))


def ranking(name: str, *gold: float, comparable: bool = True) -> Ranking:
    return Ranking(Prompt(name), tuple(f"{name} {i}" for i in range(len(gold))), gold, comparable)


NUMBERS = st.lists(st.lists(st.integers(-5, 5).map(float), min_size=2, max_size=5), min_size=1, max_size=8)


@given(NUMBERS, st.booleans())
def test_levels_follow_the_numbers(golds: list[list[float]], comparable: bool) -> None:
    made = levels([ranking(str(i), *g, comparable=comparable) for i, g in enumerate(golds)], 6)
    pairs = [
        (g, level) for gold, own in zip(golds, made, strict=True) for g, level in zip(gold, own, strict=True)
    ]
    assert all(0 <= level < 6 for _, level in pairs)
    groups = (
        [pairs]
        if comparable
        else [list(zip(g, own, strict=True)) for g, own in zip(golds, made, strict=True)]
    )
    for group in groups:
        for gold, level in group:
            for other, lower in group:
                assert (gold == other) <= (level == lower)
                assert (gold > other) <= (level >= lower)


def test_levels_by_hand() -> None:
    assert levels([ranking("a", 1.0, 0.0, comparable=False)], 6) == [[4, 1]]
    assert levels([ranking("a", -1, -2, -3, -4, comparable=False)], 6) == [[5, 3, 2, 0]]
    assert levels([ranking("a", 0.9, 0.1), ranking("b", 0.5, 0.4)], 4) == [[3, 0], [2, 1]]  # one scale


def test_gold_gradings_are_what_the_judge_reads() -> None:
    made = from_gold([ranking("a", *range(6))], RUBRIC)
    for i, grading in enumerate(made.gradings):
        reading = read_points(grading.completion, "eos", POINTS)
        assert reading.probabilities is not None
        assert reading.probabilities.index(1.0) == grading.score == i
        assert f"a {i}" in grading.prompt
    assert len({grading.completion.split()[0] for grading in made.gradings}) == 6


def test_gold_scores_are_bare_labels() -> None:
    made = from_gold([ranking("a", *range(10))], Asking(Template.load("score")))
    assert [grading.completion for grading in made.gradings] == [str(i) for i in range(1, 11)]


class Grader:
    """A model whose gradings are given by the text of the answer and the number of the attempt."""

    name = "grader"

    def __init__(self, texts: Mapping[tuple[str, int], str]) -> None:
        self.texts, self.asked = texts, Counter[str]()

    @property
    def identity(self) -> Mapping[str, Any]:
        return {"model": self.name}

    def ask(self, questions: Mapping[str, Question], desk: Desk) -> None:
        for key, question in questions.items():
            self.asked[question.texts[0]] += 1
            raw = self.texts[question.texts[0], question.repeat]
            reading = read_points(raw, "eos", question.labels)
            verdict = Verdict(reading.status, reading.probabilities, raw=raw)
            desk.ledger.done(desk.ledger.sent(key, Amount()), Amount(), question, key, self.name, verdict)


def test_gradings_of_a_model_are_kept_if_they_order_a_prompt_as_people_do() -> None:
    grader = Grader(
        {
            ("good 0", 0): "Fine.\nScore: 4", ("good 1", 0): "Poor.\nScore: 1",
            ("tied 0", 0): "Fine.\nScore: 3", ("tied 1", 0): "Fine.\nScore: 3",
            ("tied 0", 1): "Better.\nScore: 5", ("tied 1", 1): "Fine.\nScore: 3",
            ("dumb 0", 0): "Hm", ("dumb 1", 0): "Score: 2",
            ("dumb 0", 1): "Score: 1", ("dumb 1", 1): "Score: 2",
        }
    )  # fmt: skip
    desk = Desk(grader)
    rankings = [ranking(name, 1.0, 0.0, comparable=False) for name in ("good", "tied", "dumb")]
    made = agreeing(rankings, RUBRIC, Bench(desk, RUBRIC.template), attempts=2)
    assert [grading.completion for grading in made.gradings] == [
        "Fine.\nScore: 4", "Poor.\nScore: 1", "Better.\nScore: 5", "Fine.\nScore: 3",
    ]  # fmt: skip
    assert made.left_out == {"the scores do not order the answers as the ranks do": 1}
    assert grader.asked["good 0"] == 1
    assert grader.asked["tied 0"] == 2
    again = agreeing(rankings, RUBRIC, Bench(desk, RUBRIC.template), attempts=2)
    assert again.gradings == made.gradings
    assert grader.asked.total() == 10  # nothing is asked twice


@pytest.mark.parametrize(
    ("scores", "gold", "alike"),
    [
        ([3, 2, 1], [9, 5, 1], True),
        ([3, 3, 1], [9, 5, 1], False),
        ([3, 1, 1], [9, 5, 5], True),
        ([1, 2], [0, 0], True),
    ],
)
def test_orders_alike(scores: Sequence[float], gold: Sequence[float], alike: bool) -> None:
    assert orders_alike(scores, gold) == alike


@given(st.lists(st.integers(0, 5), min_size=1, max_size=60), st.none() | st.integers(1, 9))
def test_no_score_dominates(scores: list[int], most: int | None) -> None:
    gradings = [Grading(str(i), "", score) for i, score in enumerate(scores)]
    kept = balanced(Made(gradings), most=most, rng=Random(1))
    counts, before = Counter(g.score for g in kept.gradings), Counter(scores)
    ordered = sorted(before.values())
    limit = most or 2 * ordered[(len(ordered) - 1) // 2]
    assert counts == {score: min(limit, count) for score, count in before.items()}
    assert len(kept.gradings) + kept.left_out.total() == len(scores)
    assert set(kept.gradings) <= set(gradings)


def test_the_rarer_of_two_scores_limits_the_other() -> None:
    gradings = [Grading(str(i), "", 4 if i < 5 else 1) for i in range(40)]
    kept = balanced(Made(gradings), most=None, rng=Random(1))
    assert Counter(grading.score for grading in kept.gradings) == {4: 5, 1: 10}


def test_more_ranks_than_scores_cannot_be_ordered() -> None:
    few, many = ranking("few", 1, 2, 2, 3), ranking("many", 1, 2, 3, 4)
    assert orderable([few, many], 3) == [few]


def test_a_writer_without_any_clear_score_is_asked_no_further() -> None:
    names = [f"q{i}" for i in range(20)]
    grader = Grader({(f"{name} {i}", 0): "Hm" for name in names for i in range(2)})
    bench = Bench(Desk(grader), RUBRIC.template)
    with pytest.raises(DataError, match=r"none of the first 16 gradings .*--eft-writer gold"):
        agreeing([ranking(name, 1.0, 0.0) for name in names], RUBRIC, bench, attempts=3)
    assert grader.asked.total() == 16


def test_the_held_out_part_is_whole_prompts_and_stays() -> None:
    rankings = [ranking(f"q {i}", 1, 0) for i in range(200)]
    learnt, unseen = divided(rankings, 0.25, 3)
    assert 25 < len(unseen) < 75
    assert {r.prompt.text for r in learnt}.isdisjoint(r.prompt.text for r in unseen)
    assert divided(rankings[:50], 0.25, 3)[1] == [r for r in unseen if r in rankings[:50]]
    twice = [ranking("Q  7", 1, 0), ranking("q 7", 2, 3)]
    assert [] in divided(twice, 0.5, 3)
    assert divided(rankings, 0.0, 3)[1] == []
