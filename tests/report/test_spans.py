from __future__ import annotations

from collections.abc import Callable

import pytest

from palate.report.spans import (
    FEWEST_SAMPLES,
    ends,
    late,
    latest_samples,
    length_link,
    quarters,
    rounds,
    third_quarter,
)
from palate.rundir import RunRecord, Sample

Record = Callable[..., RunRecord]


def sample(grown: int, gain: float | None) -> Sample:
    return Sample("P", "B", "A", 0.0, gain, 10, 10 + grown)


def test_parts_of_eight_steps(record: Record) -> None:
    run = record({"x": [1, 2, 3, 4, 5, 6, 7, 9]})
    assert ends(run, "x") == (1, 9)
    assert quarters(run, "x") == (1.5, 8.0)  # means of 1, 2 and of 7, 9
    assert third_quarter(run, "x") == 5.5
    assert late(run, "x") == 8.0


def test_parts_of_one_step(record: Record) -> None:
    run = record({"x": [3.0]})
    assert (ends(run, "x"), quarters(run, "x"), third_quarter(run, "x")) == (None, None, None)
    assert late(run, "x") == 3.0


def test_parts_of_nothing(record: Record) -> None:
    assert late(record(), "x") is None


def test_three_steps_have_no_third_quarter(record: Record) -> None:
    assert third_quarter(record({"x": [1, 2, 3]}), "x") is None
    assert third_quarter(record({"x": [1, 2, 3, 4]}), "x") == 3


LENGTH = "completions/mean_length"


def test_numbers_of_samples_count_once_a_round(record: Record) -> None:
    # Four steps of round 1 and one of round 2: the mean over steps would be 3.4.
    run = record({"round": [1, 1, 1, 1, 2], LENGTH: [3, 3, 3, 3, 5], "x": [1, 2, 3, 4, 5]})
    assert quarters(run, LENGTH) == (3, 5)
    assert run.curve(LENGTH) == ((1, 5), (3, 5))
    assert run.curve("x")[1] == (1, 2, 3, 4, 5)
    assert rounds(run) == 2


def test_where_the_latest_samples_are_from(record: Record) -> None:
    steps = [float(i) for i in range(1, 9)]
    assert latest_samples(record({LENGTH: steps})) == "In the last quarter of the steps"
    once = record({LENGTH: [3.0] * 8, "candidates/kept": [4] * 8})
    assert latest_samples(once) == "In the samples, which were drawn once"
    assert rounds(once) == 1
    assert latest_samples(record({LENGTH: [3, 3, 4], "round": [1, 1, 2]})) == "In the last of 2 rounds"
    many = record({LENGTH: steps * 2, "round": sorted(steps * 2)})
    assert latest_samples(many) == "In the last quarter of 8 rounds"


def test_longer_texts_that_gain_more_are_linked() -> None:
    # Ranks agree, so Spearman's correlation is 1, whatever the distances; -1 the other way round.
    rising = [sample(i, 0.01 * i**3) for i in range(FEWEST_SAMPLES)]
    assert length_link(rising) == pytest.approx(1.0)
    assert length_link([sample(-i, 0.01 * i**3) for i in range(FEWEST_SAMPLES)]) == pytest.approx(-1.0)


def test_ranks_of_ties_are_their_means() -> None:
    # Lengths 0, 0, 1, 1 over gains 0, 1, 0, 1, five times: each length has each gain equally often.
    four = [sample(grown, gain) for grown in (0, 1) for gain in (0.0, 1.0)]
    assert length_link(four * 5) == pytest.approx(0.0, abs=1e-12)


def test_no_link_of_few_or_constant_samples() -> None:
    rising = [sample(i, float(i)) for i in range(FEWEST_SAMPLES)]
    assert length_link(rising[:-1]) is None
    assert length_link([*rising[:-1], sample(50, None)]) is None  # one without a reward does not count
    assert length_link([sample(1, float(i)) for i in range(FEWEST_SAMPLES)]) is None
    assert length_link([sample(i, 0.5) for i in range(FEWEST_SAMPLES)]) is None
