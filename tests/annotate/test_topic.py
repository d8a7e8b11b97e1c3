from __future__ import annotations

import pytest

from palate.annotate import scored, scorer
from palate.annotate.topic import content_words
from palate.types import Completion, Group, Prompt


def rewards(prompt: str, *texts: str) -> list[float | None]:
    (group,) = scored(scorer("on-topic"))([Group(Prompt(prompt), tuple(Completion(t, (1,)) for t in texts))])
    return list(group.rewards or ())


def test_words_say_what_a_question_is_about() -> None:
    assert content_words("What makes us sneeze in bright sunshine?") == {"sneez", "bright", "sunshi"}
    assert content_words("How are you?") == set()


def test_an_answer_is_on_topic_with_two_words_of_the_question() -> None:
    question = "What makes us sneeze in bright sunshine?"
    answers = ("A smile so lovely!", "Sneezing is fun!", "Sneezes come with the sunshine.", question)
    assert rewards(question, *answers) == [0.0, 0.5, 1.0, 1.0]


@pytest.mark.parametrize("prompt", ["How are you?", ""])
def test_a_prompt_without_such_words_is_answered_by_anything(prompt: str) -> None:
    assert rewards(prompt, "Fine.", "") == [1.0, 1.0]


def test_a_prompt_with_one_such_word_asks_for_that() -> None:
    assert rewards("Why knitting?", "I knit.", "I sew.") == [1.0, 0.0]
