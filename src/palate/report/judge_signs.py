"""Signs of runs with a judge. The thresholds are ours, as in `palate.report.signs`."""

from __future__ import annotations

from palate.report.sign import Sign
from palate.report.spans import late
from palate.report.words import percent
from palate.rundir import RunRecord

BIASED_NOTE, BIASED_WORRY = 0.3, 0.5
"""Share of pairs of which the same position wins in both orders. A judge that guesses has one half."""


def position_decides(run: RunRecord) -> Sign | None:
    """The judge prefers a position rather than a text."""
    disagree = late(run, "judge/orders_disagree")
    if disagree is None or disagree < BIASED_NOTE:
        return None
    return Sign(
        "position_decides",
        "worry" if disagree >= BIASED_WORRY else "note",
        "The judge decides by position",
        f"In the last quarter of the steps, the same position won in both orders in {percent(disagree)} of "
        "the pairs.",
        "Such pairs get probabilities near one half, so their labels say little about the texts, and the "
        "policy learns little from them.",
        "A larger judge, another --judge-template, or --judge-expert for the pairs on which this judge is "
        "unsure. `palate annotate` and `palate evaluate judge` measure a judge on labelled pairs.",
    )
