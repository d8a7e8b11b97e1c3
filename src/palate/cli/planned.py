"""Plans as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from palate.planning.choose import Choice
from palate.planning.plan import Bound, Plan

MEMORY = {
    "weights": "weights of models in training",
    "mapped": "the model's file, mapped into memory",
    "reference": "copy of the model before training",
    "others": "models that are only asked",
    "masters": "float32 copies of trained weights",
    "gradients": "gradients",
    "optimizer": "optimizer",
    "merged": "weights with the adapter merged, for sampling",
    "activations": "activations of a training pass",
    "cache": "keys and values of sampling",
}
"""The parts of memory in words."""


def plan_json(plan: Plan) -> dict[str, Any]:
    """Return a plan as values for JSON: tokens, bytes, dollars, operations and seconds."""
    values = asdict(plan)
    values["memory"] |= {"resident": plan.memory.resident, "peak": plan.memory.peak}
    if plan.sharded is not None:
        values["sharded"] |= {"resident": plan.sharded.resident, "peak": plan.sharded.peak}
    values["flops"]["total"] = plan.flops.total
    if plan.seconds is not None:
        values["seconds"]["total"] = plan.seconds.total
    return values


def show_plan(plan: Plan, console: Console) -> None:
    """Print a plan: amounts with their bounds and expectations, memory, and time."""
    amounts = _table(plan.method, "at most", "expected")
    for row in _amounts(plan):
        amounts.add_row(*row)
    console.print(amounts)
    console.print()
    memory = _table("memory of a device", "MB", *(["MB if shared"] if plan.sharded else []))
    for name, words in [*MEMORY.items(), ("peak", "most at a time")]:
        own = [getattr(one, name) / 1e6 for one in (plan.memory, plan.sharded) if one is not None]
        if any(own):
            memory.add_row(words, *(f"{value:,.0f}" for value in own))
    console.print(memory)
    if plan.seconds is not None:
        console.print()
        console.print(_times(plan))
    for note in plan.notes:
        console.print(f"- {note}", soft_wrap=True, highlight=False)


def _amounts(plan: Plan) -> Iterator[tuple[str, str, str]]:
    for name, count in plan.completions.items():
        yield f"completions: {name}", f"{count:,}", ""
    yield _row("tokens sampled", plan.sampled)
    yield _row("prompt tokens read for them", plan.read)
    if plan.annotating.scored:
        yield "completions to score", f"{plan.annotating.scored:,}", ""
    if plan.annotating.questions:
        yield "questions to the judge", f"{plan.annotating.questions:,}", ""
    judge = (
        ("verdicts", plan.verdicts),
        ("tokens that the judge reads", plan.judge_read),
        ("tokens that the judge writes", plan.judge_written),
    )
    yield from (_row(name, bound) for name, bound in judge if bound is not None)
    if plan.dollars is not None:
        yield _row("dollars", plan.dollars, "{:,.2f}")
    yield "optimizer steps", f"{plan.training.steps:,}", ""
    yield "completions learnt, counted in every pass", f"{plan.training.learned:,}", ""
    yield _row("tokens learnt", plan.learned)
    operations = f"{plan.flops.total / 1e12:,.1f}"
    known = plan.learned.expected is not None or plan.sampled.expected is not None
    yield ("operations (10^12)", "", operations) if known else ("operations (10^12)", operations, "")


def _row(name: str, bound: Bound, form: str = "{:,.0f}") -> tuple[str, str, str]:
    expected = "" if bound.expected is None else form.format(bound.expected)
    return name, form.format(bound.most), expected


def _times(plan: Plan) -> Table:
    assert plan.seconds is not None
    table = _table("time on this machine", "expected")
    for name, seconds in asdict(plan.seconds).items():
        table.add_row(name, "the server's" if seconds is None else _span(seconds))
    table.add_row("total", _span(plan.seconds.total))
    return table


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def show_choices(choices: Sequence[Choice], console: Console) -> None:
    """Print the methods that fit, best first, with reasons and the command; then the others."""
    fitting = [choice for choice in choices if not choice.missing]
    for place, choice in enumerate(fitting, 1):
        console.print(f"{place}. {choice.name}: {choice.summary}", style="bold", highlight=False)
        for sign, reasons in (("+", choice.reasons_for), ("-", choice.reasons_against)):
            for reason in reasons:
                console.print(f"   {sign} {reason}", soft_wrap=True, highlight=False)
        for command in choice.commands:
            console.print(f"   {command}", soft_wrap=True, highlight=False, markup=False)
    if not fitting:
        console.print("No method fits.")
    console.print()
    for choice in choices:
        if choice.missing:
            console.print(f"{choice.name}: {'; '.join(choice.missing)}", soft_wrap=True, highlight=False)


def choices_json(choices: Sequence[Choice]) -> list[Mapping[str, Any]]:
    """Return choices as values for JSON, best first."""
    return [asdict(choice) for choice in choices]


def _table(*titles: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(titles):
        table.add_column(title, justify="right" if i else "left")
    return table
