from __future__ import annotations

import sys
from pathlib import Path

import pytest

from palate.annotate import annotator, scorer
from palate.annotate.judges.ledger import Ledger
from palate.config import RewardConfig
from palate.errors import PalateError
from palate.types import Completion, Finish, Group, Prompt


def rewards(specs: list[str], *texts: str, finish: Finish = "eos", **options: float) -> list[float | None]:
    group = Group(Prompt("Q"), tuple(Completion(text, (1,), finish) for text in texts))
    (found,) = annotator(specs, **options)([group])
    assert found.rewards is not None
    return list(found.rewards)


@pytest.mark.parametrize(
    ("spec", "weight"),
    [
        ("length:4", 1.0),
        ("0.5*length:4", 0.5),
        ("0.5 * length:4", 0.5),
        (" 2*length:4", 2.0),
        (".25*length:4", 0.25),
        ("2.*length:4", 2.0),
        ("-1*length:4", -1.0),
        ("+1e-1*length:4", 0.1),
        ("0*length:4", 0.0),  # logged, without counting
    ],
)
def test_a_weight_in_front(spec: str, weight: float) -> None:
    assert rewards([spec], "a b", "a b c d") == pytest.approx([-0.5 * weight, 0.0])


def test_several_add_up() -> None:
    specs = ["length:2", "3*regex:yes", "-1*regex:no"]
    assert rewards(specs, "yes yes", "no no", "yes no") == [3.0, -1.0, 2.0]


def test_the_same_twice_counts_twice() -> None:
    assert rewards(["length:4", "length:4"], "a b") == [-1.0]


@pytest.mark.parametrize(
    ("spec", "hit", "miss"),
    [
        ("regex:a:b", "a:b", "ab"),  # a colon belongs to the pattern
        ("regex:a*b:c*$", "b:", "a"),  # and so does a star
        ("2*regex:^x*y$", "xxy", "x*y"),
        ("regex:3*4", "34", "33"),  # no weight: it does not stand in front
        ("regex:module:function", "module:function", "module"),
        ("regex: ", "a b", "ab"),
        ("regex:a\nb", "a\nb", "ab"),
        ("2*regex:a\nb", "a\nb", "ab"),
    ],
)
def test_patterns_with_colons_and_stars(spec: str, hit: str, miss: str) -> None:
    weight = 2.0 if spec.startswith("2") else 1.0
    assert rewards([spec], hit, miss) == [weight, 0.0]


def test_a_function_with_a_weight(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("def size(completions): return [len(c) for c in completions]\n")
    assert rewards([f"0.5*{file}:size"], "abcd") == [2.0]


def test_the_penalty_for_cut_completions() -> None:
    assert rewards(["regex:a"], "a", finish="length", missing_eos_penalty=0.25) == [0.75]
    assert rewards(["regex:a"], "a", finish="eos", missing_eos_penalty=0.25) == [1.0]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("", "reward '' is unknown; expected sentiment, on-topic"),
        ("sentimant", "reward 'sentimant' is unknown; expected sentiment, on-topic"),
        ("Sentiment", "reward 'Sentiment' is unknown; expected sentiment, on-topic"),
        ("on_topic", "reward 'on_topic' is unknown; expected sentiment, on-topic"),
        ("sentimant", "or ranker:ID; did you mean `sentiment`?"),
        ("Sentiment", "did you mean `sentiment`?"),
        ("on_topic", "did you mean `on-topic`?"),
        ("lenght:40", "did you mean `length:40`?"),
        ("0.5*sentimet", "did you mean `sentiment`?"),
        ("lenght:40", "reward 'lenght:40' is unknown; expected sentiment, on-topic"),
        ("modle:a/b", "did you mean `model:a/b`?"),
        ("rankr:a/b", "did you mean `ranker:a/b`?"),
        ("0.5*", "reward '0.5*' is unknown"),
        ("0.5", "reward '0.5' is unknown"),
        ("x*sentiment", "reward 'x*sentiment' is unknown"),
        ("nan*sentiment", "reward 'nan*sentiment' is unknown"),
        (":", "reward ':' is unknown"),
        (":f", "reward ':f' is unknown"),
        ("length", "reward 'length' is unknown"),
        ("length:", "reward 'length:' is not a length rule; expected length:WORDS, such as length:40"),
        ("length:forty", "is not a length rule"),
        ("length:-5", "is not a length rule"),
        ("length:4.5", "is not a length rule"),
        ("length:²", "is not a length rule"),  # a digit, but no number
        ("length:0", "length:0 is not a valid target"),
        ("regex", "reward 'regex' is unknown"),
        ("regex:", "regex: has no pattern"),
        ("regex:(", "is not a valid regular expression"),
        ("model:", "holds no model"),
        ("ranker", "reward 'ranker' is unknown"),
        ("ranker:", "holds no model"),
        ("ranker:./no/such/model", "model' does not exist"),
        ("model:./no/such/model", "model' does not exist"),
        ("no_such_module:f", "reward module 'no_such_module' cannot be found"),
        ("no_such.py:f", "reward file 'no_such.py' does not exist"),
        ("json:no_such", "json has no function 'no_such'; it has "),
        ("..mod:f", "reward '..mod:f'"),
        ("1e999*length:4", "has the weight inf; expected a finite number"),
    ],
)
def test_what_names_nothing(spec: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PalateError) as caught:
        annotator([spec])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_module_may_be_called_nearly_as_a_reward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "lengths.py").write_text("def short(completions): return [1.0 for _ in completions]")
    assert rewards(["lengths:short"], "a", "b") == [1.0, 1.0]


def test_nothing_given() -> None:
    with pytest.raises(PalateError, match="no reward is given"):
        annotator([])


def test_a_spec_without_weight_is_a_scorer() -> None:
    assert scorer("length:40").name == "length:40"


def test_functions_with_one_name_do_not_share_their_saved_rewards() -> None:
    given = RewardConfig(reward=[lambda completions: [1.0], lambda completions: [5.0]]).reward
    annotate = annotator(given, kept=Ledger())
    group = Group(Prompt("a"), (Completion("x", (1,)),))
    for _ in range(2):  # computed, then read from the ledger
        assert annotate([group])[0].rewards == (6.0,)
    twice = given[0]
    assert annotator([twice, twice], kept=Ledger())([group])[0].rewards == (2.0,)
