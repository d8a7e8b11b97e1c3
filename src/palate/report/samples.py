"""Prepare samples for the report's list of samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from palate.report.panels import letter
from palate.report.words import count, number, signed
from palate.rundir import RunRecord, Sample

MOST_SAMPLES = 500
"""Most samples per run in a report; more would make the page slow."""
LONGEST_TEXT, LONGEST_LINE = 20_000, 160
"""Most characters of a text, and of the one-line version of a prompt."""
CHUNK = 25
"""Samples per collapsible block of the page; the page's script replaces the blocks by pages."""

ENDS = {"eos": "ended", "stop": "ended at a stop text", "length": "truncated"}


@dataclass(frozen=True)
class Shown:
    """The texts of a sample, and the numbers it is sorted by; unknown numbers are empty."""

    run: int
    letter: str
    line: str
    prompt: str
    """The prompt in full; empty if `line` already shows all of it."""
    before: str
    after: str
    reward_before: str
    reward_after: str
    tokens_before: str
    tokens_after: str
    finish_before: str
    finish_after: str
    change: str
    direction: str
    gain: str
    reward: str
    length: int
    grown: int
    cut: int
    at: int = 0


@dataclass(frozen=True)
class Chunk:
    """The samples in one collapsible block, numbered from 1."""

    first: int
    last: int
    samples: tuple[Shown, ...]


def shown(run: RunRecord, index: int) -> list[Shown]:
    """Return the samples of one run, at most MOST_SAMPLES; `index` is the run's position in the report."""
    return [_shown(sample, index) for sample in run.samples[:MOST_SAMPLES]]


def chunked(samples: Sequence[Shown]) -> list[Chunk]:
    """Divide samples into blocks, and number them across all blocks."""
    placed = [Shown(**{**vars(sample), "at": i}) for i, sample in enumerate(samples)]
    parts = [placed[start : start + CHUNK] for start in range(0, len(placed), CHUNK)]
    return [Chunk(part[0].at + 1, part[-1].at + 1, tuple(part)) for part in parts]


def left_out(runs: Sequence[RunRecord]) -> str:
    """Return a note on samples that are not in the page; empty if all are."""
    most = max((len(run.samples) for run in runs), default=0)
    if most <= MOST_SAMPLES:
        return ""
    return f"the first {count(MOST_SAMPLES)} of up to {count(most)} are shown, and samples.jsonl has all"


def shortened(text: str, longest: int = LONGEST_TEXT) -> str:
    """Return a text truncated to `longest` characters, with a note on how many are missing."""
    if len(text) <= longest:
        return text
    return f"{text[:longest]} \N{HORIZONTAL ELLIPSIS} ({count(len(text) - longest)} more characters)"


def _shown(sample: Sample, index: int) -> Shown:
    gain = sample.gain
    line = " ".join(sample.prompt[: 4 * LONGEST_LINE].split())[:LONGEST_LINE]
    rise = 0 if gain is None else math.copysign(gain != 0, gain)
    return Shown(
        run=index,
        letter=letter(index),
        line=line,
        prompt="" if line == sample.prompt else shortened(sample.prompt),
        before=shortened(sample.before),
        after=shortened(sample.after),
        reward_before=_reward(sample.reward_before),
        reward_after=_reward(sample.reward_after),
        tokens_before=count(sample.tokens_before),
        tokens_after=count(sample.tokens_after),
        finish_before=ENDS.get(sample.finish_before, ""),
        finish_after=ENDS.get(sample.finish_after, ""),
        change="unscored" if gain is None else signed(gain),
        direction={1: "up", -1: "down"}.get(int(rise), "even"),
        gain="" if gain is None else repr(gain),
        reward="" if sample.reward_after is None else repr(sample.reward_after),
        length=sample.tokens_after,
        grown=sample.tokens_after - sample.tokens_before,
        cut=int(sample.finish_after == "length"),
    )


def _reward(value: float | None) -> str:
    return "no reward" if value is None else f"reward {number(value)}"
