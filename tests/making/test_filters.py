from __future__ import annotations

import string
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from palate.making.filters import KEYWORDS, Left, PromptFilter, normal, subjects
from palate.making.rouge import rouge_l, word_count, words
from palate.types import Prompt

TEXTS = st.lists(
    st.lists(
        st.sampled_from(["What", "is", "the", "sea", "draw", "map", "-", "1.", "海", "море"]), max_size=8
    ).map(" ".join),
    max_size=12,
)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", Left.EMPTY),
        (" \n", Left.EMPTY),
        ("Tell me more", Left.SHORT),
        ("word " * 151, Left.LONG),
        ("- what is the sea like", Left.START),
        ("* ¿what is the sea like", Left.START),
        ("¿¿¿", Left.SHORT),
        ("“« “« “« “«", Left.START),
        ("Write a program that sorts a list", Left.PROGRAM),
        ("Describe what the IMAGE shows in detail", Left.KEYWORD),
        ("Where should I go to next summer", Left.KEYWORD),
        ("where  IS the old\ntown hall", Left.DUPLICATE),
        ("Where is the new town hall", Left.SIMILAR),
        ("Tell me all", Left.SHORT),
        ("How do I imagine a filename", None),  # whole words only
        ("海はどうして青いの", None),
        ("请画一张图片给我看看吧", Left.KEYWORD),
        ("รูปภาพของทะเลสวย", Left.KEYWORD),
        ("أرسل الصورة إلى صديقي الآن", None),
        ("¿Cuál es la capital de Francia?", None),
        ("¡Escribe un poema sobre el mar!", None),
        ("“Carpe diem” means what in English?", None),
        ('"what is the sea like"', None),
        ("བོད་ཡིག་གི་སྙན་ངག་ཅིག་འབྲི་རོགས།", None),
        ("ｳﾐﾆﾂｲﾃﾉｼ", None),
        ("Ёлка или сосна: что выбрать?", None),
        ("word " * 150, None),
        ("Why is the sky blue", None),
    ],
)
def test_reasons(text: str, reason: Left | None) -> None:
    keywords = [*KEYWORDS, "图片", "รูปภาพ", "صورة"]
    assert PromptFilter(["Where is the old town hall"], keywords=keywords).fault(text) == reason


def test_the_threshold_itself_still_passes() -> None:
    # 7 of 10 words in common: an F1 of exactly 0.7.
    one, other = "a b c d e f g x y z", "a b c d e f g p q r"
    assert rouge_l(words(one), words(other)) == 0.7
    assert PromptFilter([one]).fault(other) is None
    assert PromptFilter([one], similarity=0.69).fault(other) == Left.SIMILAR


def test_it_compares_with_all_kept_prompts_not_with_the_first() -> None:
    sieve = PromptFilter()
    second = "Which bread goes well with onion soup"
    given = ["Why is the sky blue today", second, f"{second} then", f"{second} now", f"{second} please"]
    assert [text for text in given if sieve.takes(text)] == given[:2]
    assert sieve.left_out == {Left.SIMILAR: 3}


@given(TEXTS, TEXTS)
def test_what_is_kept(seeds: list[str], candidates: list[str]) -> None:
    sieve = PromptFilter(seeds)
    kept = [text for text in candidates if sieve.takes(text)]
    assert len(kept) + sieve.left_out.total() == len(candidates)
    for i, text in enumerate(kept):
        assert 4 <= word_count(text) <= 150
        assert text.strip()[0].isalnum()
        assert not {word.strip(string.punctuation).lower() for word in text.split()} & set(KEYWORDS)
        for other in [*seeds, *kept[:i]]:
            assert normal(text) != normal(other)
            assert rouge_l(words(text), words(other)) <= 0.7


@given(TEXTS)
def test_a_second_pass_keeps_nothing(candidates: list[str]) -> None:
    sieve = PromptFilter()
    first: Callable[[str], bool] = sieve.takes
    kept = [text for text in candidates if first(text)]
    assert not any(sieve.takes(text) for text in kept)
    fresh = PromptFilter()
    assert [text for text in kept if fresh.takes(text)] == kept  # what is kept passes by itself


def test_a_grading_stands_for_the_prompt_that_it_is_about() -> None:
    assert subjects(Prompt("grade this", columns={"about": "why", "score": 3})) == ["grade this", "why"]
    assert subjects(Prompt("say", columns={"about": None})) == ["say"]


def test_no_keywords() -> None:
    assert PromptFilter(keywords=()).fault("Draw a picture of the sea") is None
