from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.making.rouge import Near, common_subsequence, rouge_l, word_count, words

FEW = st.lists(st.sampled_from("abcd"), max_size=12)


def by_table(one: list[str], other: list[str]) -> int:
    """The longest common subsequence by its definition."""
    table = [[0] * (len(other) + 1) for _ in range(len(one) + 1)]
    for i, a in enumerate(one):
        for j, b in enumerate(other):
            table[i + 1][j + 1] = table[i][j] + 1 if a == b else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(FEW, FEW)
def test_the_common_subsequence_is_that_of_the_table(one: list[str], other: list[str]) -> None:
    assert common_subsequence(one, other) == by_table(one, other) == common_subsequence(other, one)


POEM = "write a short poem about the sea at night"


@pytest.mark.parametrize(
    ("other", "f1"),
    [
        ("Write a short poem about the sea!", 0.875),
        ("write a long poem about the sea at dawn", 0.777778),
        ("write one short poem about the sea at night", 0.888889),
        ("compose a limerick on mountains", 0.142857),
        (" ".join(reversed(POEM.split())), 0.111111),
        (POEM.upper(), 1.0),
        ("", 0.0),
    ],
)
def test_known_values(other: str, f1: float) -> None:
    assert rouge_l(words(POEM), words(other)) == pytest.approx(f1, abs=1e-6)


ENGLISH = [
    "Can you recommend a book on the history of Rome?",
    "Can you recommend two books about Roman history, please?",
    "I don't know what to cook; I've got eggs, rice and 3 tomatoes.",
    "What can I cook with eggs, rice and tomatoes?",
    "Explain the snake_case convention in one sentence.",
    "Write an e-mail to my landlord about the broken heating (it's 12 degrees).",
]


def test_on_english_it_is_the_value_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for one in ENGLISH:
        for other in ENGLISH:
            expected = scorer.score(one, other)["rougeL"].fmeasure
            assert rouge_l(words(one), words(other)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Напиши короткое стихотворение о море", "Напиши длинное стихотворение о море", True),
        ("请写一首关于大海的短诗", "请写一首关于大海的长诗", True),
        ("समुद्र के बारे में एक छोटी कविता लिखो", "समुद्र के बारे में एक लंबी कविता लिखो", True),
        ("ทำไมท้องฟ้าเป็นสีฟ้า", "ทำไมท้องฟ้าเป็นสีแดง", True),
        ("请写一首关于大海的短诗", "今天天气怎么样", False),
        ("Напиши стихотворение", "Какая сегодня погода", False),
    ],
)
def test_other_scripts_have_words_too(one: str, other: str, alike: bool) -> None:
    near = Near()
    near.add(words(one))
    assert near.has_like(words(other)) == alike


def test_words_keep_their_marks_and_fold_case() -> None:
    assert words("Straße, CAFÉ — cafe\u0301!") == ["strasse", "café", "café"]
    assert words("हिन्दी") == ["हिन्दी"]
    assert words("don't_go") == ["don", "t", "go"]
    assert word_count("don't go") == 2
    assert word_count("天气好") == 3
    assert word_count("བོད་ཡིག་གི་སྙན་ངག") == 5
    assert word_count("ｳﾐﾆﾂｲﾃ") == 6


@given(st.lists(FEW, max_size=6), FEW, st.sampled_from([0.0, 0.3, 0.5, 0.7, 0.9, 1.0]))
def test_a_near_copy_is_found_as_by_comparing_with_all(
    kept: list[list[str]], text: list[str], most: float
) -> None:
    near = Near(most)
    for other in kept:
        near.add(other)
    assert near.has_like(text) == any(rouge_l(text, other) > most for other in kept)
