"""The page and the table of `palate evaluate judge`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.report.pages import MOST_SAMPLES, write_page
from palate.report.plots import Interval, intervals
from palate.report.render import Drawn
from palate.report.words import count, interval, number, percent

Result = Mapping[str, Any]

FIGURES: Mapping[str, tuple[str, str]] = {
    "accuracy": ("accuracy", "pairs with the winner of the reference; a tie counts one half"),
    "kappa": ("Cohen's kappa", "agreement beyond chance: 0 is chance, 1 is full agreement"),
    "ece": ("calibration error", "mean distance of P from the observed frequency; 0 is best"),
    "ties": ("ties", "pairs with P = 1/2, or with equal scores"),
    "consistency": ("position consistency", "the same text wins in both orders"),
    "first_share": ("first position wins", "50 % is unbiased"),
    "longer_share": ("longer text wins", "of texts of unequal length"),
    "longer_reference": ("longer text in the reference", "compare it with the line above"),
    "length_coefficient": ("length coefficient", "log-odds per typical length difference; 0 means no effect"),
    "pairwise": ("pairwise accuracy", "pairs of a prompt in the reference's order; a tie counts one half"),
    "best": ("best among perfect", "completions with a perfect score that the reference ranks first"),
    "pairwise_strict": ("pairwise, strict", "a tie or a missing score counts as wrong"),
    "exact": ("exact match", "prompts with every pair in the reference's order, without ties"),
    "spearman": ("Spearman's rho", "mean over prompts"),
    "kendall": ("Kendall's tau-b", "mean over prompts"),
    "unclear": ("missing scores", "pairs with a completion without a score"),
    "uncorrelated": ("prompts without a correlation", "their scores, or references, are all equal"),
    "cost_per_1000_verdicts": ("cost of 1,000 verdicts", "in dollars; 0 for a model of your own"),
    "tokens_per_verdict": ("tokens per verdict", "read and written"),
}
"""Label and meaning of each figure, in order."""

RATES = frozenset(
    {"accuracy", "ties", "consistency", "first_share", "longer_share", "longer_reference"}
    | {"pairwise", "pairwise_strict", "best", "exact", "unclear", "uncorrelated"}
)


def table(result: Result) -> tuple[list[str], list[list[str]]]:
    """Return the head and the rows of the table: figure, value and meaning."""
    rows = [
        [label, _cell(result, name), meaning] for name, (label, meaning) in FIGURES.items() if name in result
    ]
    return ["figure", "value", "meaning"], rows


def lead(result: Result) -> str:
    """Return a sentence on the size of the data."""
    counted, noun = (
        (result["pairs"], "pairs") if result["kind"] == "pairs" else (result["prompts"], "prompts")
    )
    text = f"{count(counted)} {noun} of {result['data']} are measured."
    if result["unusable"]:
        what = "pairs have" if noun == "pairs" else "completions have"
        text += f" {count(result['unusable'])} {what} no usable label and are left out."
    if noun == "prompts" and not result["pairs"]:
        text += (
            " There are no figures, because no prompt has two completions with different reference scores in "
            f"{result['reference']}."
        )
    return text


def write_judge_page(result: Result, samples: Sequence[Mapping[str, Any]], target: Path) -> Path:
    """Write the page on an annotator.

    Raises:
        RunError: the file cannot be written.
    """
    head, rows = table(result)
    shown = samples[:MOST_SAMPLES]
    about = (
        f"The {len(shown)} most certain of {len(samples)} pairs with another winner than in the reference."
        if shown
        else "No measured pair has another winner than in the reference."
    )
    return write_page(
        "evaluation.html.j2",
        target,
        kind="Palate judge evaluation",
        title=result["judge"],
        lead=lead(result),
        note="",
        notes=["The reference is the data's own preference or score."],
        head=head,
        rows=rows,
        plots=_plots(result),
        shown=about if result["kind"] == "pairs" else "Scores have no pairs to show.",
        samples=[_sample(sample) for sample in shown],
    )


def _cell(result: Result, name: str) -> str:
    value = result[name]
    if value is None:
        return "no finite estimate" if name == "length_coefficient" else ""
    if name in RATES:
        return f"{percent(value)} {interval(result.get(f'{name}_low'), result.get(f'{name}_high'))}".strip()
    if name == "length_coefficient":
        return f"{number(value)} ± {number(result['length_standard_error'], 2)}"
    return f"${number(value)}" if name.startswith("cost") else number(value)


def _plots(result: Result) -> list[Drawn]:
    rows = [
        Interval(FIGURES[name][0], result[name], result[f"{name}_low"], result[f"{name}_high"])
        for name in FIGURES
        if result.get(name) is not None and result.get(f"{name}_low") is not None
    ]
    caption = "Shares with their 95 % intervals; prompts are the clusters."
    return [Drawn("Rates", caption, intervals(rows, "judge-rates", "Rates"))] if rows else []


def _sample(sample: Mapping[str, Any]) -> dict[str, Any]:
    better, worse = sample["texts"]
    return {
        "prompt": sample["prompt"],
        "outputs": [
            {
                "name": "preferred by the reference",
                "text": better,
                "detail": f"P(wins) {number(sample['p'])}",
            },
            {"name": "preferred by the judge", "text": worse, "detail": f"P(wins) {number(1 - sample['p'])}"},
        ],
    }
