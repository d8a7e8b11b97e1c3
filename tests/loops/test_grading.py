from __future__ import annotations

from collections.abc import Sequence

import pytest

from palate.errors import RunError
from palate.loops import judged_groups
from palate.loops.grading import PILOT
from palate.types import Completion, Group, Prompt

GROUPS = [Group(Prompt(f"q{i}"), tuple(Completion(f"{i} {j}", (i, j)) for j in range(4))) for i in range(40)]


class Judge:
    """Gives the completions these scores in turn, and counts the prompts that it is asked about."""

    def __init__(self, *scores: float | None) -> None:
        self.scores, self.asked, self.given = scores, 0, 0

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        judged = []
        for group in groups:
            own = [self.scores[(self.given + j) % len(self.scores)] for j in range(4)]
            self.given += 4
            judged.append(group.annotated(tuple(own)))
        self.asked += len(groups)
        return judged


def test_a_judge_that_tells_answers_apart_is_asked_about_all() -> None:
    judge = Judge(1, 2, 3, 3, None)
    judged = judged_groups(judge, GROUPS, "round 1")
    assert [g.prompt.id for g in judged] == [g.prompt.id for g in GROUPS]
    assert judge.asked == 40


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            (None, None, 3, 4, None),
            r"round 2: the judge gave no clear score to \d+ of 64 .*--eft",
        ),
        ((None,), "no clear score to 64 of 64 completions"),
        ((5,) * 39 + (4,), r"the same score, 5, to 6\d of 64 completions; .*--judge-mode score"),
        ((3.0, None), "the same score, 3, to 32 of 32"),
        (tuple(0.1 + 1e-7 * k for k in range(160)), "the same score, 0.1, to 64 of 64"),
        (
            (1.0,) * 4 + (2.0,) * 4,
            "the same score, in each of 16 prompts, so its scores depend on the prompt",
        ),
    ],
)
def test_a_useless_judge_is_found_out_on_the_first_prompts(
    scores: tuple[float | None, ...], message: str
) -> None:
    judge = Judge(*scores)
    with pytest.raises(RunError, match=message):
        judged_groups(judge, GROUPS, "round 2")
    assert judge.asked == PILOT


def test_a_judge_that_gets_useless_later_is_found_out_too() -> None:
    judge = Judge(*[1, 2, 3, 4] * PILOT, *[None] * 400)
    with pytest.raises(RunError, match="no clear score to 96 of 160"):
        judged_groups(judge, GROUPS, "round 1")


def test_equal_texts_have_equal_scores() -> None:
    groups = [Group(group.prompt, group.completions[:1] * 4) for group in GROUPS]
    assert len(judged_groups(Judge(*(1.0,) * 4, *(2.0,) * 4), groups, "round 1")) == 40


def test_a_few_answers_may_be_alike_by_chance() -> None:
    assert len(judged_groups(Judge(2), GROUPS[:1], "round 1")) == 1
