from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from palate.annotate.judges.judging import Bench
from palate.annotate.judges.records import POINTS, Question, Verdict
from palate.annotate.judges.template import Template
from palate.loops.meta import most_disputed
from palate.types import Completion, Group, Prompt


class Desk:
    """Gives each answer its gradings, as texts that end in a digit, in turn."""

    def __init__(self, gradings: dict[str, Sequence[str]]) -> None:
        self.gradings = gradings

    def verdicts(self, questions: Sequence[Question]) -> list[Verdict]:
        texts = [self.gradings[question.texts[0]][question.repeat] for question in questions]
        return [
            Verdict("ok", tuple(float(label == text[-1]) for label in POINTS), raw=f"{text}\n")
            for text in texts
        ]

    def prompt_of(self, question: Question) -> Prompt:
        return Prompt(question.texts[0])


def test_repeated_gradings_count_in_the_variance() -> None:
    # 11 gradings each. Variance of "sure": 10/121, but 1/4 over its two texts. Variance of "unsure": 28/121.
    gradings = {
        "sure": ["Score: 3"] * 10 + ["Score: 4"],
        "unsure": [f"{i} Score: {3 if i < 7 else 4}" for i in range(11)],
    }
    desk: Any = Desk(gradings)
    bench = Bench(desk, Template.load("rubric"), samples=11)
    group = Group(Prompt("q"), tuple(Completion(text, (0,)) for text in gradings))
    dispute = most_disputed(group, bench, desk)
    assert dispute is not None
    assert dispute.prompt.content == "unsure"
    assert dispute.texts == tuple(gradings["unsure"])
    assert dispute.scores == (3,) * 7 + (4,) * 4

    alone = Group(Prompt("q"), (Completion("sure", (0,)),))
    dispute = most_disputed(alone, bench, desk)
    assert dispute is not None
    assert (dispute.texts, dispute.scores) == (("Score: 3", "Score: 4"), (3, 4))
