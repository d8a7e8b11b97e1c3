from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from palate.annotate import Annotator, judged, scored
from palate.errors import AnnotatorError
from palate.journal import Journal
from palate.run.annotating import MOST_WARNINGS, SLICE, journaled
from palate.testing import ScriptedJudge, ScriptedScorer
from palate.types import Completion, Group, Prompt


def group(prompt: str, *texts: str, **columns: Any) -> Group:
    completions = tuple(Completion(text, tuple(text.encode()) or (0,)) for text in texts)
    return Group(Prompt(prompt, columns), completions)


class Asked:
    """A scorer that notes what it is asked about; a question mark has no reward."""

    name = "asked"

    def __init__(self) -> None:
        self.texts: list[str] = []

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[float | None]:
        self.texts += [c.text for c in completions]
        return [None if c.text == "?" else len(c.text) / 3 for c in completions]


@pytest.fixture
def asked() -> Asked:
    return Asked()


Wrap = Callable[..., Annotator]


@pytest.fixture
def wrap(tmp_path: Path, asked: Asked) -> Wrap:
    """The annotator of a run that starts, or starts again: the journal is opened anew."""

    def make(annotate: Annotator | None = None, **options: Any) -> Annotator:
        nothing: dict[str, Any] = {
            "start": lambda: None,
            "observe": lambda *what: None,
            "say": lambda text: None,
            "name": "reward",
        }
        journal = Journal(tmp_path / "journal.db")
        return journaled(annotate or scored(asked), journal, **(nothing | options))

    return make


def rewards(groups: Sequence[Group]) -> list[tuple[float | None, ...] | None]:
    return [g.rewards for g in groups]


GROUPS = [group("P", "a", "bb"), group("Q", "ccc", "?"), group("R", "a", "bb")]


# ---- Asked once ------------------------------------------------------------------------------------


def test_what_was_said_is_not_asked_again(wrap: Wrap, asked: Asked) -> None:
    plain = scored(asked)(GROUPS)
    asked.texts.clear()
    first = wrap()(GROUPS)
    assert first == plain
    assert rewards(first) == [(1 / 3, 2 / 3), (1.0, None), (1 / 3, 2 / 3)]
    assert asked.texts == ["a", "bb", "ccc", "?", "a", "bb"]
    # Not even where nothing usable was said: it would not be another time.
    again = wrap()(GROUPS)
    assert again == first
    assert len(asked.texts) == 6


def test_only_what_is_new_is_asked(wrap: Wrap, asked: Asked) -> None:
    wrap()(GROUPS[1:2])
    asked.texts.clear()
    found = wrap()([GROUPS[0], GROUPS[1], GROUPS[2]])
    assert asked.texts == ["a", "bb", "a", "bb"]
    assert [g.prompt.text for g in found] == ["P", "Q", "R"]
    assert rewards(found) == [(1 / 3, 2 / 3), (1.0, None), (1 / 3, 2 / 3)]


def test_who_sampled_it_does_not_matter(wrap: Wrap, asked: Asked) -> None:
    wrap()(GROUPS[:1])
    asked.texts.clear()
    later = tuple(replace(c, policy_version=7, logps=(-1.0,)) for c in GROUPS[0].completions)
    (found,) = wrap()([replace(GROUPS[0], completions=later)])
    assert asked.texts == []
    assert found.rewards == (1 / 3, 2 / 3)
    # The completions are those that were asked about now.
    assert [(c.policy_version, c.logps) for c in found.completions] == [(7, (-1.0,))] * 2


DIFFERENT = {
    "prompt": group("another", "a", "bb"),
    "text": group("P", "a", "bc"),
    "order": group("P", "bb", "a"),
    "neighbour": group("P", "a", "cc"),
    "one more": group("P", "a", "bb", "c"),
    "one less": group("P", "a"),
    "column": group("P", "a", "bb", wanted="e"),
    "finish": Group(
        Prompt("P"), tuple(replace(c, finish="length") for c in group("P", "a", "bb").completions)
    ),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_all_that_an_answer_may_rest_on_is_its_key(wrap: Wrap, asked: Asked, what: str) -> None:
    wrap()([group("P", "a", "bb")])
    asked.texts.clear()
    wrap()([DIFFERENT[what]])
    assert asked.texts == [c.text for c in DIFFERENT[what].completions]


@pytest.mark.parametrize(
    ("one", "other"),
    [({"wanted": "e"}, {"wanted": "f"}), ({"a": None}, {"a": "None"}), ({"a": [1]}, {"a": [1, 2]})],
)
def test_columns_are_told_apart(wrap: Wrap, asked: Asked, one: dict[str, Any], other: dict[str, Any]) -> None:
    wrap()([group("P", "a", **one)])
    asked.texts.clear()
    wrap()([group("P", "a", **other)])
    assert asked.texts == ["a"]
    wrap()([group("P", "a", **one)])
    assert asked.texts == ["a"]


def test_several_annotators_of_a_run_are_told_apart(wrap: Wrap, asked: Asked) -> None:
    wrap(name="reward")(GROUPS[:1])
    wrap(name="other")(GROUPS[:1])
    assert len(asked.texts) == 4


def test_parts_come_back(wrap: Wrap, asked: Asked) -> None:
    def both() -> Annotator:
        return scored(asked, ScriptedScorer(lambda text: -1.0 if text == "a" else 0.1), weights=[1.0, 0.5])

    first = wrap(both())(GROUPS)
    assert first[0].parts == {"asked": (1 / 3, 2 / 3), "scripted": (-1.0, 0.1)}
    assert first[1].parts == {"asked": (1.0, None), "scripted": (0.1, 0.1)}
    again = wrap(both())(GROUPS)
    assert len(asked.texts) == 6
    assert [g.parts for g in again] == [g.parts for g in first]
    assert rewards(again) == rewards(first)
    # Parts that were there before stay, as with a fresh answer.
    (kept,) = wrap(both())([replace(GROUPS[0], parts={"judge": (0.0, 1.0)})])
    assert kept.parts == {"judge": (0.0, 1.0), "asked": (1 / 3, 2 / 3), "scripted": (-1.0, 0.1)}


# ---- Twice the same --------------------------------------------------------------------------------


def test_equal_groups_of_one_call_have_one_answer(wrap: Wrap) -> None:
    # A judge that is a sampled model says another thing each time: a run that is resumed must hear what the
    # first one heard.
    verdicts = iter([0.9, 0.2, 0.4, 0.6])
    capricious = judged(ScriptedJudge(lambda one, other: next(verdicts)))
    twice = [group("P", "a", "b"), group("Q", "c", "d"), group("P", "a", "b")]
    first = wrap(capricious)(twice)
    again = wrap(capricious)(twice)
    assert rewards(again) == rewards(first)
    assert first[0].rewards == first[2].rewards


def test_the_table_has_each_completions_own_reward(tmp_path: Path) -> None:
    # What a judge says of a completion depends on the one beside it.
    journal = Journal(tmp_path / "journal.db")
    strength = {"a": 1.0, "b": 0.5, "c": 2.0}
    judge = judged(ScriptedJudge(lambda x, y: 1.0 if strength[x] > strength[y] else 0.0))
    annotate = journaled(
        judge, journal, name="r", start=lambda: None, observe=lambda *w: None, say=lambda t: None
    )
    for i, texts in enumerate([("a", "b"), ("a", "c")]):
        one = group("P", *texts)
        journal.keep_completions(f"chunk {i}", i, [one.prompt], [one.completions])
        annotate([one])
    found = [(row["completion"], row["reward"]) for row in journal.table()]
    assert found == [("a", 1.0), ("b", 0.0), ("a", 0.0), ("c", 1.0)]


# ---- In slices -------------------------------------------------------------------------------------


def many(count: int) -> list[Group]:
    return [group(str(i), f"{i} yes", f"{i} oh no") for i in range(count)]


@pytest.mark.parametrize("count", [0, 1, SLICE, SLICE + 1, 3 * SLICE - 1])
def test_slices_change_nothing(wrap: Wrap, asked: Asked, count: int) -> None:
    told: list[tuple[str, int]] = []
    groups = many(count)
    found = wrap(observe=lambda *what: told.append(what))(groups)
    assert found == scored(Asked())(groups)
    assert len(asked.texts) == 2 * count
    assert sum(amount for _, amount in told) == 2 * count
    assert len(told) == -(-count // SLICE)
    assert {stage for stage, _ in told} <= {"annotate"}
    assert all(amount <= 2 * SLICE for _, amount in told)


def test_what_was_said_before_an_error_is_kept(wrap: Wrap) -> None:
    # An API that is gone, half-way through a long measurement.
    groups, calls = many(3 * SLICE), []

    def fails(given: Sequence[Group]) -> list[Group]:
        calls.append(len(given))
        if len(calls) == 3:
            raise AnnotatorError("the server is gone")
        return scored(Asked())(given)

    with pytest.raises(AnnotatorError, match="the server is gone"):
        wrap(fails)(groups)
    asked = Asked()
    found = wrap(scored(asked))(groups)
    assert len(asked.texts) == 2 * SLICE  # the third slice's alone
    assert found == scored(Asked())(groups)


def test_one_new_group_without_a_reward_among_known_ones_ends_nothing(wrap: Wrap) -> None:
    # Of the whole batch something is usable; that most of it was known already is nobody's mistake.
    batch = [group("P", "a", "bb"), group("Q", "ccc", "dddd"), group("R", "?", "?")]
    expected = scored(Asked())(batch)
    wrap()(batch[:2])
    assert rewards(wrap()(batch)) == rewards(expected)


# ---- What is said ----------------------------------------------------------------------------------


def test_prompts_without_a_reward_are_named_a_few_times(wrap: Wrap) -> None:
    said: list[str] = []
    annotate = wrap(say=said.append)
    odd = [Group(Prompt(f"prompt {i} " + "x" * 99, where=f"p.jsonl:{i}"), GROUPS[1].completions)
           for i in range(MOST_WARNINGS + 3)]  # fmt: skip
    for _ in range(2):
        annotate([*odd, GROUPS[0]])
    assert len(said) == MOST_WARNINGS
    expected = "prompt 0 " + "x" * 51
    assert said[0] == f"no usable reward for 1 of 2 completions of '{expected}' p.jsonl:0: skipped"
