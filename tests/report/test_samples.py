from __future__ import annotations

from collections.abc import Callable

import pytest

from palate.report.samples import (
    CHUNK,
    LONGEST_LINE,
    LONGEST_TEXT,
    MOST_SAMPLES,
    chunked,
    left_out,
    shortened,
    shown,
)
from palate.rundir import RunRecord, Sample

Record = Callable[..., RunRecord]


def test_a_sample_in_words(record: Record) -> None:
    (found,) = shown(record(samples=[Sample("P", "B", "A", 0.25, 1.0, 3, 1200, "stop", "length")]), 1)
    assert (found.letter, found.line, found.before, found.after) == ("B", "P", "B", "A")
    assert (found.reward_before, found.reward_after) == ("reward 0.250", "reward 1.00")
    assert (found.tokens_before, found.tokens_after) == ("3", "1,200")
    assert (found.finish_before, found.finish_after) == ("ended at a stop text", "truncated")
    assert (found.change, found.direction, found.gain, found.reward) == ("+0.75", "up", "0.75", "1.0")
    assert (found.length, found.grown, found.cut) == (1200, 1197, 1)


@pytest.mark.parametrize(
    ("after", "change", "direction"),
    [(0.0, "−0.25", "down"), (0.25, "0.00", "even"), (None, "unscored", "even")],
)
def test_changes(record: Record, after: float | None, change: str, direction: str) -> None:
    (found,) = shown(record(samples=[Sample("P", "B", "A", 0.25, after)]), 0)
    assert (found.change, found.direction) == (change, direction)
    assert (found.gain == "") == (found.reward == "") == (after is None)


def test_a_prompt_is_said_once_if_a_line_is_enough(record: Record) -> None:
    short, lines, long = shown(
        record(samples=[Sample(text, "B", "A") for text in ("one line", "two\nlines", "x" * 5000)]), 0
    )
    assert (short.line, short.prompt) == ("one line", "")
    assert (lines.line, lines.prompt) == ("two lines", "two\nlines")
    assert (long.line, long.prompt) == ("x" * LONGEST_LINE, "x" * 5000)


def test_long_texts_are_cut_and_say_so() -> None:
    assert shortened("x" * LONGEST_TEXT) == "x" * LONGEST_TEXT
    assert shortened("x" * (LONGEST_TEXT + 1200)) == "x" * LONGEST_TEXT + " … (1,200 more characters)"


def test_folds(record: Record) -> None:
    chunks = chunked(shown(record(samples=[Sample("P", "B", "A")] * (2 * CHUNK + 1)), 0))
    assert [(c.first, c.last) for c in chunks] == [
        (1, CHUNK),
        (CHUNK + 1, 2 * CHUNK),
        (2 * CHUNK + 1, 2 * CHUNK + 1),
    ]
    assert [sample.at for chunk in chunks for sample in chunk.samples] == list(range(2 * CHUNK + 1))
    assert chunked([]) == []


def test_not_too_many(record: Record) -> None:
    few, many = (
        record(samples=[Sample("P", "B", "A")]),
        record(samples=[Sample("P", "B", "A")] * (MOST_SAMPLES + 1)),
    )
    assert len(shown(many, 0)) == MOST_SAMPLES
    assert left_out([few]) == left_out([]) == ""
    assert f"the first {MOST_SAMPLES}" in left_out([few, many])
