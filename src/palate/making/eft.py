"""Evaluation fine-tuning data (EFT): questions to a judge with the gradings that it should give.

Yuan et al. 2024, arXiv:2401.10020, let a model grade answers that people have ranked, and keep the gradings
whose order agrees with the ranks. `agreeing` does this. `from_gold` writes the gradings from the ranks
instead, for models that are too small to write useful ones.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median_low
from typing import Literal

from palate.annotate.judges.judging import Bench
from palate.annotate.judges.reading import read_points
from palate.annotate.judges.records import POINTS, SCORES, Question, Verdict
from palate.annotate.judges.template import Template
from palate.data.ranked import Ranking
from palate.errors import DataError

Mode = Literal["rubric", "score"]

PILOT = 16
"""Number of gradings after which a writer that has given no clear score is asked no further."""

LABELS = {"rubric": POINTS, "score": SCORES}
"""The possible scores of each mode, the lowest first."""

HOLDING = (
    "None of the statements holds.",
    "One of the statements holds.",
    "Two of the statements hold.",
    "Three of the statements hold.",
    "Four of the statements hold.",
    "All of the statements hold.",
)
"""Justifications that `from_gold` writes by default, by points. The first words differ, so that a model
decides on the points when it writes them."""

OPENING = "\n\nAnswer:\n"
"""The end of a question to a model without a chat template (as in `palate.annotate.judges.local`)."""


@dataclass(frozen=True)
class Asking:
    """The question of a judge, the same as it is asked later in training.

    Attributes:
        template: the template, in mode rubric or score.
        criteria: the user's wishes, in plain words.
        longest: the most characters shown of each text.
        chat: the model that learns has a chat template.
        reasoning: the most tokens of a grading, which a template may mention.
    """

    template: Template
    criteria: str = ""
    longest: int = 8000
    chat: bool = True
    reasoning: int = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """The possible scores, the lowest first."""
        return LABELS["rubric" if self.template.mode == "rubric" else "score"]

    def question(self, ranking: Ranking, index: int) -> Question:
        """Return the question about one answer of a ranking."""
        return Question(
            self.template,
            ranking.prompt.content,
            (ranking.answers[index],),
            self.labels,
            criteria=self.criteria,
            reasoning=self.reasoning,
        )

    def text(self, question: Question) -> str:
        """Return the question as the prompt of a demonstration."""
        return question.render(self.longest) + ("" if self.chat else OPENING)


@dataclass(frozen=True)
class Grading:
    """One example: a question to the judge with its answer, a demonstration to imitate."""

    prompt: str
    completion: str
    score: int
    about: str = ""
    """The prompt of the graded answer, so that a run can keep new prompts apart from it."""

    def row(self) -> dict[str, str | int]:
        """Return the row of a data file."""
        return {**vars(self)}


@dataclass
class Made:
    """Gradings, and the number of prompts or gradings that were left out, by reason."""

    gradings: list[Grading]
    left_out: Counter[str] = field(default_factory=Counter)


def from_gold(rankings: Sequence[Ranking], asking: Asking, justifications: Sequence[str] = HOLDING) -> Made:
    """Return a grading of every answer, written by template from people's scores or ranks.

    The justification repeats only the number of points: nothing in the ranks says which statements hold.

    Args:
        rankings: the ranked answers.
        asking: the question that the examples contain.
        justifications: for mode rubric, the justification of each number of points, the lowest first.
    """
    points = levels(rankings, len(asking.labels))
    gradings = []
    for ranking, own in zip(rankings, points, strict=True):
        for i, level in enumerate(own):
            label = asking.labels[level]
            written = (
                f"{justifications[level]}\nScore: {label}" if asking.template.mode == "rubric" else label
            )
            question = asking.text(asking.question(ranking, i))
            gradings.append(Grading(question, written, int(label), ranking.prompt.text))
    return Made(gradings)


def read_justifications(path: Path) -> tuple[str, ...]:
    """Return the justifications in a text file: a line for each number of points, the lowest first.

    Raises:
        DataError: the file cannot be read, has another number of lines, has two equal lines, or has a line
            that contains a score.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    lines = tuple(line.strip() for line in text.split("\n") if line.strip())
    need = f"justifications need {len(POINTS)} different lines, for {POINTS[0]} to {POINTS[-1]} points"
    if len(lines) != len(POINTS):
        raise DataError(f"{path} has {len(lines)} lines with text; {need}")
    for place, line in enumerate(lines):
        if line in lines[:place]:
            raise DataError(f"{path} has the line {line!r} twice; {need}")
        label = POINTS[place]
        read = read_points(f"{line}\nScore: {label}", "eos", POINTS).probabilities
        if read is None or read[place] != 1:
            raise DataError(f"{path}: {line!r} contains a score, so that a judge could not read the grading")
    return lines


def levels(rankings: Sequence[Ranking], count: int) -> list[list[int]]:
    """Return a level in [0, count) for each answer: the quantile of its number.

    Scores on one scale are compared with those of all prompts, ranks with those of the same prompt. Equal
    numbers get equal levels, and no number gets a lower level than a smaller one of the same scale.
    """
    shared = [g for ranking in rankings if ranking.comparable for g in ranking.gold]
    quantile = _quantiles(shared)
    made = []
    for ranking in rankings:
        own = quantile if ranking.comparable else _quantiles(ranking.gold)
        made.append([min(count - 1, int(count * own(number))) for number in ranking.gold])
    return made


def _quantiles(numbers: Iterable[float]) -> Callable[[float], float]:
    """Return the function from a number to its mid-rank among the numbers, in (0, 1)."""
    counts = Counter(numbers)
    total, below, place = sum(counts.values()), 0, {}
    for number in sorted(counts):
        place[number] = (below + counts[number] / 2) / total
        below += counts[number]
    return place.__getitem__


def orderable(rankings: Sequence[Ranking], scores: int) -> list[Ranking]:
    """Return the rankings with at most as many different ranks as a judge has scores.

    No grading can order the answers of the others strictly.
    """
    return [ranking for ranking in rankings if len(set(ranking.gold)) <= scores]


def agreeing(rankings: Sequence[Ranking], asking: Asking, bench: Bench, *, attempts: int = 1) -> Made:
    """Return the gradings of a model that order the answers of a prompt as people do.

    All answers of a prompt are graded, up to `attempts` times; the first attempt that orders every pair of
    answers with different ranks strictly as people do is kept whole. A prompt without one is left out.

    Args:
        rankings: the ranked answers.
        asking: the question that the examples contain.
        bench: asks the model; its verdicts are kept in its ledger, so that no question is asked twice.
        attempts: the most gradings of an answer.

    Raises:
        DataError: none of the first gradings has a clear score.
    """
    waiting, kept, reasons = list(range(len(rankings))), {}, {}
    for attempt in range(attempts):
        questions = [
            bench.sampled(asking.question(rankings[r], i), attempt)
            for r in waiting
            for i in range(len(rankings[r].answers))
        ]
        if attempt == 0:
            _require_one_clear(bench.desk.verdicts(questions[:PILOT]))
        verdicts = iter(bench.desk.verdicts(questions))
        for r in list(waiting):
            own = [next(verdicts) for _ in rankings[r].answers]
            shares = [v.probabilities for v in own if v is not None and v.probabilities is not None]
            if len(shares) < len(own):
                reasons[r] = "a grading has no clear score"
                continue
            scores = [int(asking.labels[share.index(max(share))]) for share in shares]
            if not orders_alike(scores, rankings[r].gold):
                reasons[r] = "the scores do not order the answers as the ranks do"
                continue
            waiting.remove(r)
            texts = [v.raw.strip() for v in own if v is not None]
            kept[r] = [
                Grading(asking.text(asking.question(rankings[r], i)), text, score, rankings[r].prompt.text)
                for i, (text, score) in enumerate(zip(texts, scores, strict=True))
            ]
    gradings = [grading for r in sorted(kept) for grading in kept[r]]
    return Made(gradings, Counter(reasons[r] for r in waiting))


def _require_one_clear(verdicts: Sequence[Verdict | None]) -> None:
    if len(verdicts) == PILOT and not any(v is not None and v.usable for v in verdicts):
        noted = next((f" (the first: {v.note})" for v in verdicts if v is not None and v.note), "")
        raise DataError(
            f"none of the first {PILOT} gradings has a clear score{noted}, so no more are asked for; use a "
            "better --eft-writer, a larger --judge-reasoning if gradings are truncated, or --eft-writer gold"
        )


def orders_alike(scores: Sequence[float], gold: Sequence[float]) -> bool:
    """Return True if the scores order strictly every two answers that gold orders."""
    places = range(len(gold))
    return all(scores[i] > scores[j] for i in places for j in places if gold[i] > gold[j])


def balanced(made: Made, *, most: int | None, rng: Random) -> Made:
    """Return the gradings in random order, with at most `most` of each score.

    Without a number, it is twice the median count of the scores that occur (the lower one of two): the middle
    scores dominate what models write, and a judge that learns from them gives all answers the same score.
    """
    counts = Counter(grading.score for grading in made.gradings)
    if most is None and counts:
        most = 2 * median_low(counts.values())
    keys = [rng.random() for _ in made.gradings]
    kept, seen = [], Counter[int]()
    for i in sorted(range(len(keys)), key=keys.__getitem__):
        grading = made.gradings[i]
        seen[grading.score] += 1
        if seen[grading.score] <= (most or 0):
            kept.append(grading)
    left_out = Counter(made.left_out)
    left_out["more gradings of a score than --per-score"] += len(made.gradings) - len(kept)
    return Made(kept, +left_out)


def divided(rankings: Sequence[Ranking], share: float, seed: int) -> tuple[list[Ranking], list[Ranking]]:
    """Return the rankings to learn from and the held-out ones, about `share` of the prompts.

    A hash of the seed and of the prompt decides, so that all rankings of a prompt are on one side, and more
    data do not move a prompt to the other side. Prompts that differ in case or white space count as one.
    """
    parts: tuple[list[Ranking], list[Ranking]] = ([], [])
    for ranking in rankings:
        words = " ".join(ranking.prompt.text.casefold().split())
        number = int.from_bytes(hashlib.blake2b(f"{seed} {words}".encode(), digest_size=8).digest(), "big")
        parts[number < math.ldexp(share, 64)].append(ranking)
    return parts
