"""A small test of the judge before a run spends its budget: position bias, and accuracy on given pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from palate.annotate import Annotator
from palate.annotate.judges.build import Judging
from palate.config import JudgeConfig
from palate.data import Stream, read_comparisons
from palate.launch.measure import fitting_prompts
from palate.learn import Learner, Policy
from palate.run import JudgeAnnotator, Run
from palate.statistics import rate_interval
from palate.types import Comparison, Completion, Content, Group, Prompt, said
from palate.world import current

BIASED = 0.5
"""Share of pairs whose winner the position decides from which the run warns."""

UNDECIDED = 0.05
"""Mean distance of P from 1/2 below which the run warns."""

TENTH = 0.1
"""Largest share of a limit that the probe may use."""


def probe_judge(
    annotate: Annotator | None, learner: Learner, prompts: Sequence[Prompt], cfg: Any, run: Run
) -> None:
    """Ask a judge that compares about pairs of the base's own samples, and about pairs with a known winner.

    The run stores the numbers, so a resumed run does not ask again. The samples have their own seed and
    change nothing in the run.

    Raises:
        BudgetError: a limit is reached.
        DataError: `probe_data` cannot be used.
    """
    could_compare = getattr(cfg, "judge", None) is not None and cfg.judge_mode in (None, "pairwise")
    if current().size > 1 and could_compare and cfg.probe_pairs:
        run.display.say("the judge is not tested before the first step, since the run has several processes")
    if not isinstance(annotate, JudgeAnnotator) or not annotate.court.compares or not cfg.probe_pairs:
        return
    assert isinstance(learner, Policy), "a method with a judge trains a policy"
    court, policy, count = annotate.court, learner, cfg.probe_pairs
    options: dict[str, Any] = {"columns": getattr(cfg, "map", {}), "limit": count}
    known = [] if cfg.probe_data is None else read_comparisons(cfg.probe_data, **options)[0]

    def numbers() -> dict[str, float]:
        fitting = list(fitting_prompts(policy, prompts, cfg))
        if not fitting:
            return {}
        drawn = Stream(fitting, seed=run.seed("probe prompts")).batch(0, min(count, len(fitting)))
        seed = run.seed("probe")
        sampled = policy.snapshot().sample(drawn, 2, cfg.sampling, seed=seed, purpose="probe")
        own = [group for group in sampled if group.completions[0].text != group.completions[1].text]
        given = [_group(pair) for pair in known]
        if (reason := _too_much(court, [*own, *given], cfg)) is not None:
            run.display.say(f"the judge is not tested before the first step: {reason}")
            return {}
        return _measured(court, own, given, run.display.say)

    run.measure("judge probe", numbers)


def _measured(
    court: Judging, own: Sequence[Group], known: Sequence[Group], say: Callable[[str], None]
) -> dict[str, float]:
    groups = [*own, *known]
    pairs = [(group.completions[0], group.completions[1]) for group in groups]
    prompts = [group.prompt for group in groups]
    verdicts = court.judge([*prompts, *prompts], [*pairs, *((b, a) for a, b in pairs)])
    both = [
        None if first is None or second is None else (first, second)
        for first, second in zip(verdicts[: len(pairs)], verdicts[len(pairs) :], strict=True)
    ]
    usable = [orders for orders in both[: len(own)] if orders is not None]
    numbers = {"judge/probe_pairs": float(len(own))}
    if own:
        numbers["judge/probe_unusable"] = 1 - len(usable) / len(own)
    if usable:
        numbers |= {
            "judge/probe_orders_disagree": _mean([(a - 0.5) * (b - 0.5) > 0 for a, b in usable]),
            "judge/probe_first_share": _mean([((a > 0.5) + (b > 0.5)) / 2 for a, b in usable]),
            "judge/probe_certainty": _mean([abs((a + 1 - b) / 2 - 0.5) for a, b in usable]),
        }
    right = [
        (0.5 * ((a > b) + (a + 1 - b >= 1)), group.prompt.id)
        for group, orders in zip(known, both[len(own) :], strict=True)
        if orders is not None
        for a, b in [(orders[0], orders[1])]
    ]
    if right:
        rate = rate_interval([win for win, _ in right], [key for _, key in right])
        names = ("judge/probe_accuracy", "judge/probe_accuracy_low", "judge/probe_accuracy_high")
        numbers |= dict(zip(names, rate[:3], strict=True))
    for line in _lines(numbers):
        say(line)
    court.metrics()  # its counts are not those of the first step
    return numbers


def _lines(numbers: dict[str, float]) -> Iterator[str]:
    """Yield the results, then a warning for each fault."""
    yield from _position_lines(numbers)
    if "judge/probe_accuracy" in numbers:
        accuracy, low, high = (numbers[f"judge/probe_accuracy{end}"] for end in ("", "_low", "_high"))
        yield f"the judge's accuracy on the probe data: {accuracy:.0%} [{low:.0%}, {high:.0%}]"
        if low <= 0.5:
            yield "warning: this accuracy could be that of a coin; use a better judge, or more --probe-pairs"


def _position_lines(numbers: dict[str, float]) -> Iterator[str]:
    pairs, biased = numbers["judge/probe_pairs"], numbers.get("judge/probe_orders_disagree")
    if not pairs:
        yield "the two completions of every prompt are the same, so the judge's position bias was not tested"
        return
    if biased is None:
        yield f"warning: the judge gave no usable verdict on {pairs:.0f} pairs of the model's own completions"
        return
    certainty = numbers["judge/probe_certainty"]
    yield (
        f"the judge on {pairs:.0f} pairs of the model's own completions: the position decides in "
        f"{biased:.0%}, the text shown first wins {numbers['judge/probe_first_share']:.0%}, P is "
        f"{certainty:.2f} from 1/2 on average"
    )
    if biased >= BIASED:
        yield (
            f"warning: the judge has a strong position bias: in {biased:.0%} of the pairs the same position "
            "wins in both orders, which gives labels near 1/2; use a larger judge or another --judge-template"
        )
    elif certainty < UNDECIDED:
        yield (
            f"warning: the judge hardly distinguishes these completions: P is {certainty:.2f} from 1/2 on "
            "average; clearer --criteria or a larger judge may help"
        )


def _too_much(court: Judging, groups: Sequence[Group], cfg: JudgeConfig) -> str | None:
    """Return a sentence on a limit of which the probe could use more than a tenth; None if there is none."""
    questions = [question for group in groups for question in court.questions(group)]
    count, amount = court.expected(questions, cfg)
    needs = (
        ("--max-verdicts", count, cfg.max_verdicts),
        ("--max-judge-tokens", amount.tokens, cfg.max_judge_tokens),
        ("--max-cost", amount.cost, cfg.max_cost),
    )
    for flag, need, limit in needs:
        if limit is not None and need > TENTH * limit:
            return f"it could use {need:g} of {flag} {limit:g}, more than a tenth; see --probe-pairs"
    return None


def _group(pair: Comparison) -> Group:
    return Group(pair.prompt, (_completion(pair.chosen), _completion(pair.rejected)))


def _completion(content: Content) -> Completion:
    return Completion(content if isinstance(content, str) else said(content[-1]), (0,))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
