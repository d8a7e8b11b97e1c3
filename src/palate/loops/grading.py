"""The judge of a method in rounds, checked before anything learns from it, and measured on ranked data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from palate.annotate import Annotator
from palate.config import DataConfig
from palate.data.ranked import Ranking, read_rankings
from palate.errors import DataError, RunError
from palate.learn import Policy
from palate.loops.records import account_of
from palate.making.filters import normal, subjects
from palate.memory import key_of
from palate.ranking import Ranked, judge_metrics
from palate.run import Run
from palate.types import Example, Group

PILOT = 16
"""Number of prompts after which a judge is checked first, so that a useless one does not cost a round."""

FEWEST = 8
"""Number of completions below which chance alone may make a judge look useless."""

DIGITS = 3
"""Decimals of a score by which two scores differ; smaller differences are no opinion of a judge."""

UNCLEAR, ALIKE = 0.5, 0.9
"""Share of completions without a usable score, and share of equal scores, above which a judge is useless."""

ADVICE = (
    "nothing can be learnt from this judge. Teach it to grade first (--eft, from `palate make eft`), judge "
    "with a larger model (--judge local:MODEL), ask another question (--judge-template, --criteria), or try "
    "--judge-mode score"
)


def judged_groups(annotate: Annotator, groups: Sequence[Group], where: str) -> list[Group]:
    """Return the groups with rewards; a judge that is useless on the first ones is asked no further.

    Args:
        annotate: the judge.
        groups: groups without rewards.
        where: the start of an error message, such as `round 1`.

    Raises:
        RunError: the judge gives too few clear scores, or nearly all scores are the same.
    """
    pilot = annotate(groups[:PILOT])
    _require_use(pilot, where)
    if len(groups) <= PILOT:
        return pilot
    judged = [*pilot, *annotate(groups[PILOT:])]
    _require_use(judged, where)
    return judged


def _require_use(groups: Sequence[Group], where: str) -> None:
    rewards = [reward for group in groups for reward in group.rewards or ()]
    usable = [reward for reward in rewards if reward is not None]
    if len(rewards) < FEWEST:
        return
    missing = len(rewards) - len(usable)
    if missing > UNCLEAR * len(rewards):
        raise RunError(
            f"{where}: the judge gave no clear score to {missing} of {len(rewards)} completions; {ADVICE}; a "
            "judge whose answers are truncated needs more --judge-reasoning"
        )
    ((score, count),) = Counter(round(reward, DIGITS) for reward in usable).most_common(1)
    if count > ALIKE * len(usable):
        raise RunError(
            f"{where}: the judge gave the same score, {score:g}, to {count} of {len(usable)} completions; "
            f"{ADVICE}"
        )
    unlike = [own for group in groups if (own := _scores_of_different_texts(group))]
    if len(unlike) >= FEWEST and all(len(own) == 1 for own in unlike):
        raise RunError(
            f"{where}: the judge gave all completions of a prompt the same score, in each of {len(unlike)} "
            f"prompts, so its scores depend on the prompt alone; {ADVICE}"
        )


def _scores_of_different_texts(group: Group) -> set[float]:
    """Return the different scores of a group; none if fewer than two different texts have a score."""
    scores = {
        completion.text: round(reward, DIGITS)
        for completion, reward in zip(group.completions, group.rewards or (), strict=True)
        if reward is not None
    }
    return set(scores.values()) if len(scores) > 1 else set()


def read_ranked(
    policy: Policy,
    source: str | None,
    cfg: DataConfig,
    run: Run,
    lessons: Sequence[Example] = (),
    *,
    gap: float = 0.0,
) -> list[tuple[Ranking, Group]]:
    """Return held-out ranked answers, each prompt with its answers as a group in the policy's tokens.

    Args:
        policy: its tokens are used.
        source: the data; None for no answers.
        cfg, run: of the method.
        lessons: examples that the policy learns; prompts among them are left out, and the run says so.
        gap: the smallest difference of people's numbers that makes a pair.

    Raises:
        DataError: the data cannot be used, all prompts are among the lessons, or no pair is left.
        RunError: the run started with other data.
    """
    if source is None:
        return []
    account = account_of(cfg)
    rankings = read_rankings(source, split=cfg.eval_split, columns=cfg.map, account=account)
    rankings = _unlearnt(rankings, source, lessons, run)
    widest = max(max(ranking.gold) - min(ranking.gold) for ranking in rankings)
    if widest < gap or not widest:
        raise DataError(
            f"{source}: people's numbers of two answers to a prompt differ by at most {widest:g}, so "
            f"judge_gap {gap:g} leaves no pair to measure the judge on; lower judge_gap or give other "
            "judge_data"
        )
    codec = policy.model.codec
    ranked = [
        (ranking, Group(ranking.prompt, tuple(codec.completion(ranking.prompt, a) for a in ranking.answers)))
        for ranking in rankings
    ]
    run.report_data(source, account)
    facts = [[ranking.prompt.id, ranking.answers, ranking.gold] for ranking in rankings]
    run.require_same("the ranked answers", key_of(facts), f"the data {source!r}")
    return ranked


def _unlearnt(
    rankings: Sequence[Ranking], source: str, lessons: Sequence[Example], run: Run
) -> list[Ranking]:
    """Return the rankings whose prompts no lesson has; the display shows the number of the others."""
    learnt = {normal(text): example.prompt.where for example in lessons for text in subjects(example.prompt)}
    known = [ranking.prompt for ranking in rankings if normal(ranking.prompt.text) in learnt]
    if not known:
        return list(rankings)
    overlap = (
        f"{len(known)} of the {len(rankings)} prompts of {source} are among the lessons, the first "
        f"({known[0].where}) as {learnt[normal(known[0].text)]}"
    )
    if len(known) == len(rankings):
        raise DataError(f"{overlap}; judge_data must be ranked answers that nothing is learnt from")
    run.display.say(f"{overlap}; the judge is not measured on them")
    return [ranking for ranking in rankings if normal(ranking.prompt.text) not in learnt]


def measure_judge(
    annotate: Annotator, ranked: Sequence[tuple[Ranking, Group]], gap: float, run: Run, *, perfect: float
) -> None:
    """Measure the judge on held-out ranked answers, once after a step; see `palate.ranking`.

    Args:
        annotate: the judge as it is now.
        ranked: the answers; nothing is measured without any.
        gap: the smallest difference of people's scores that makes a pair.
        run: logs the metrics, as `eval_judge/...`.
        perfect: the highest score of the judge's scale.
    """
    if not ranked:
        return

    def metrics() -> dict[str, float]:
        judged = annotate([group for _, group in ranked])
        items = [
            Ranked(ranking.gold, group.rewards or ())
            for (ranking, _), group in zip(ranked, judged, strict=True)
        ]
        numbers = judge_metrics(items, gap=gap, perfect=perfect)
        scores = [score for item in items for score in item.scores if score is not None]
        if scores:
            numbers["mean"] = sum(scores) / len(scores)  # a drift of the scores on the same answers
        return {f"eval_judge/{name}": value for name, value in numbers.items()}

    run.measure("judge", metrics)
