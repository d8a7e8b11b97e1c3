"""The judge of a method in rounds, checked before anything learns from it, and measured on ranked data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from palate.annotate import Annotator
from palate.config import DataConfig
from palate.data.ranked import Ranking, read_rankings
from palate.errors import RunError
from palate.learn import Policy
from palate.loops.records import account_of
from palate.memory import key_of
from palate.ranking import Ranked, judge_metrics
from palate.run import Run
from palate.types import Group

PILOT = 16
"""Number of prompts after which a judge is checked first, so that a useless one does not cost a round."""

FEWEST = 8
"""Number of completions below which chance alone may make a judge look useless."""

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
    ((score, count),) = Counter(usable).most_common(1)
    if count > ALIKE * len(usable):
        raise RunError(
            f"{where}: the judge gave the same score, {score:g}, to {count} of {len(usable)} completions; "
            f"{ADVICE}"
        )


def read_ranked(policy: Policy, source: str, cfg: DataConfig, run: Run) -> list[tuple[Ranking, Group]]:
    """Return held-out ranked answers, each prompt with its answers as a group in the policy's tokens.

    Raises:
        DataError: the data cannot be used.
        RunError: the run started with other data.
    """
    account = account_of(cfg)
    rankings = read_rankings(source, split=cfg.eval_split, columns=cfg.map, account=account)
    codec = policy.model.codec
    ranked = [
        (ranking, Group(ranking.prompt, tuple(codec.completion(ranking.prompt, a) for a in ranking.answers)))
        for ranking in rankings
    ]
    run.report_data(source, account)
    facts = [[ranking.prompt.id, ranking.answers, ranking.gold] for ranking in rankings]
    run.require_same("the ranked answers", key_of(facts), f"the data {source!r}")
    return ranked


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
