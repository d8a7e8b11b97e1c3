from __future__ import annotations

import pytest

from palate.annotate import Rule, length, regex, sentiment
from palate.errors import AnnotatorError
from palate.types import Completion, Prompt


def score(rule: Rule, *texts: str) -> list[float | None]:
    return rule([Prompt("Q")] * len(texts), [Completion(text, (1,)) for text in texts])


def test_length_is_best_at_the_target_and_falls_alike_on_both_sides() -> None:
    texts = ["", "one", "one two", "one\ntwo  three", "a b c d"]
    assert score(length(2), *texts) == [-1.0, -0.5, 0.0, -0.5, -1.0]
    assert length(2).name == "length:2"


@pytest.mark.parametrize("target", [0, -1])
def test_length_needs_a_target(target: int) -> None:
    with pytest.raises(AnnotatorError, match=f"length:{target} is not a valid target; expected a number"):
        length(target)


def test_regex_looks_anywhere_in_the_text() -> None:
    assert score(regex(r"b+c"), "abbc", "bc", "cb", "") == [1.0, 1.0, 0.0, 0.0]
    assert score(regex(r"(?m)^yes$"), "no\nyes\nno", "yes!") == [1.0, 0.0]


@pytest.mark.parametrize("pattern", ["(", "[a", "*a"])
def test_a_broken_pattern_is_shown(pattern: str) -> None:
    with pytest.raises(AnnotatorError) as caught:
        regex(pattern)
    assert f"regex:{pattern} is not a valid regular expression: " in str(caught.value)


def test_an_empty_pattern_would_be_found_everywhere() -> None:
    with pytest.raises(AnnotatorError, match="regex: has no pattern"):
        regex("")


def test_sentiment_has_the_sign_of_the_text() -> None:
    pytest.importorskip("vaderSentiment", reason="the extra `demo` is not installed")
    good, none, bad = score(sentiment(), "What a wonderful, happy day!", "A table.", "I hate this, awful.")
    assert good is not None
    assert bad is not None
    assert 0.5 < good <= 1.0
    assert none == 0.0
    assert -1.0 <= bad < -0.5


def test_sentiment_without_its_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(AnnotatorError, match=r"pip install 'palate\[demo\]'"):
        sentiment()
