"""Meta-rewarding (Wu et al. 2024, arXiv:2407.19594): the policy judges its gradings, and learns from that."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from math import perm
from statistics import pvariance

from palate.annotate import Annotator
from palate.annotate.judges.judging import Bench, PairwiseJudge, RubricJudge
from palate.annotate.judges.local import LocalModel
from palate.annotate.judges.records import POINTS, labels_of
from palate.annotate.judges.template import Template
from palate.errors import DataError
from palate.learn import Policy
from palate.run import JudgeAnnotator
from palate.select.battles import Results, battle_scores, position_weights
from palate.types import Completion, Group, Pair, Prompt


@dataclass(frozen=True)
class Disputed:
    """The answer of a prompt on whose score its gradings differ most.

    Attributes:
        prompt: the question of the judge, in the wording of the first grading.
        texts: the distinct gradings with a clear score.
        scores: their scores.
    """

    prompt: Prompt
    texts: tuple[str, ...]
    scores: tuple[int, ...]


def judge_pairs(
    groups: Sequence[Group], policy: Policy, annotate: Annotator
) -> tuple[list[Pair], dict[str, float]]:
    """Return pairs of a better and a worse grading, by the policy's own verdicts, and their metrics.

    For each prompt, the gradings of the answer whose scores vary most are compared in pairs and in both
    orders. A win counts less in the position that wins more often. The gradings with the highest and the
    lowest score of these battles form a pair.

    Args:
        groups: groups whose completions the policy has graded; its gradings are read from the run's ledger.
        policy: the judge.
        annotate: the annotator of that judge.
    """
    own, bench, model = _benches(annotate)
    disputes = (most_disputed(group, own, model) for group in groups)
    disputed = [dispute for dispute in disputes if dispute is not None]
    battles = _battles(PairwiseJudge(bench), disputed)
    weights = position_weights(battles)
    pairs = [
        pair
        for dispute, results in zip(disputed, battles, strict=True)
        if (pair := _pair(dispute, battle_scores(results, len(dispute.texts), weights), policy)) is not None
    ]
    decided = [result for results in battles for result in results.values() if result]
    numbers: dict[str, float] = {"meta/disputed": len(disputed), "meta/pairs": len(pairs)}
    meetings = sum(perm(len(dispute.texts), 2) for dispute in disputed)
    if meetings:
        numbers["meta/unusable"] = 1 - sum(map(len, battles)) / meetings
    if decided:
        numbers["meta/first_wins"] = decided.count(1) / len(decided)
    return pairs, numbers


def check_room(annotate: Annotator, *, meta: bool) -> None:
    """Check that the questions of a rubric's judge fit the context of its model, before anything is trained.

    Args:
        annotate: the judge; nothing is checked for others than a local model with a rubric.
        meta: the judge compares its gradings too.

    Raises:
        DataError: a question does not fit, even without the texts to judge.
    """
    judge = annotate.court.judge if isinstance(annotate, JudgeAnnotator) else None
    if not isinstance(judge, RubricJudge) or not isinstance(judge.bench.desk.model, LocalModel):
        return
    judge.bench.desk.model.prompt_of(judge.bench.question(Prompt(""), ("",), POINTS))
    if not meta:
        return
    _, bench, model = _benches(annotate)
    question = bench.question(Prompt(""), ("", ""), labels_of("", ("", "")))
    try:
        model.prompt_of(question)
    except DataError:
        raise DataError(
            "variant is meta, but the question that compares two gradings does not fit the model's context, "
            "even without the gradings; use a model with a longer context, or variant self"
        ) from None


def _benches(annotate: Annotator) -> tuple[Bench, Bench, LocalModel]:
    """Return the bench of the rubric's judge, that of the meta-judge, and the model behind both."""
    assert isinstance(annotate, JudgeAnnotator), "meta-rewarding has a judge"
    judge = annotate.court.judge
    assert isinstance(judge, RubricJudge), "meta-rewarding grades by a rubric"
    own = judge.bench
    model = own.desk.model
    assert isinstance(model, LocalModel), "meta-rewarding trains its judge"
    template = Template.load("pairwise", name="meta")
    return own, Bench(own.desk, template, samples=own.samples, logprobs=own.logprobs), model


def most_disputed(group: Group, bench: Bench, model: LocalModel) -> Disputed | None:
    """Return the answer of a group whose scores vary most; None if no answer has two different scores."""
    most: Disputed | None = None
    spread = 0.0
    for completion in group.completions:
        question = bench.question(group.prompt, (completion.text,), POINTS)
        verdicts = bench.desk.verdicts([bench.sampled(question, i) for i in range(bench.samples)])
        clear = [
            (v.raw.strip(), v.probabilities.index(1.0))
            for v in verdicts
            if v is not None and v.probabilities is not None
        ]
        own = pvariance([score for _, score in clear]) if clear else 0.0  # a repeated grading counts again
        if own > spread:
            spread, by_text = own, dict(clear)
            question_text = model.prompt_of(bench.sampled(question, 0))
            most = Disputed(question_text, tuple(by_text), tuple(by_text.values()))
    return most


def _battles(judge: PairwiseJudge, disputed: Sequence[Disputed]) -> list[Results]:
    """Let all gradings of each answer meet in both orders; a battle without a usable verdict is left out."""
    meetings = [
        (d, m, n) for d, one in enumerate(disputed) for m, n in permutations(range(len(one.texts)), 2)
    ]
    completions = [[Completion(text, (0,)) for text in one.texts] for one in disputed]
    chances = judge(
        [disputed[d].prompt for d, _, _ in meetings],
        [(completions[d][m], completions[d][n]) for d, m, n in meetings],
    )
    results: list[dict[tuple[int, int], int]] = [{} for _ in disputed]
    for (d, m, n), p in zip(meetings, chances, strict=True):
        if p is not None:
            results[d][m, n] = (p > 0.5) - (p < 0.5)
    return list(results)


def _pair(dispute: Disputed, scores: Sequence[float], policy: Policy) -> Pair | None:
    """Return the gradings with the highest and the lowest score as a pair in tokens; None for a tie."""
    best, worst = scores.index(max(scores)), scores.index(min(scores))
    if scores[best] == scores[worst]:
        return None
    codec = policy.model.codec
    chosen, rejected = (codec.completion(dispute.prompt, dispute.texts[i]) for i in (best, worst))
    return Pair(dispute.prompt, chosen, rejected, scores[best] - scores[worst])
