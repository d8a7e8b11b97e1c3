from __future__ import annotations

from collections.abc import Callable

import pytest

from palate.report.rl_signs import entropy_collapses, steps_too_long, value_useless
from palate.rundir import RunRecord

Record = Callable[..., RunRecord]


@pytest.mark.parametrize(("late", "level"), [(0.5, None), (0.1, None), (0.05, "note"), (-0.1, "worry")])
def test_a_useless_value_function(record: Record, late: float, level: str | None) -> None:
    sign = value_useless(record({"val/explained_variance": [0.0] * 6 + [late] * 2}))
    assert (sign and sign.level) == level
    assert value_useless(record({"val/explained_variance": [-1.0] * 7})) is None  # it has just begun


@pytest.mark.parametrize(("last", "level"), [(2.0, None), (1.0, None), (0.9, "note"), (0.3, "worry")])
def test_entropy_that_collapses(record: Record, last: float, level: str | None) -> None:
    sign = entropy_collapses(record({"policy/entropy_avg": [2.0, 2.0, 1.5, 1.5, 1.5, 1.5, last, last]}))
    assert (sign and sign.level) == level


@pytest.mark.parametrize(("late", "level"), [(0.1, None), (0.2, "note"), (0.4, "worry")])
def test_steps_that_are_too_long(record: Record, late: float, level: str | None) -> None:
    run = record({"policy/clipfrac_avg": [0.0] * 6 + [late] * 2, "policy/approxkl_avg": [0.02] * 8})
    sign = steps_too_long(run)
    assert (sign and sign.level) == level
    if sign is not None:
        assert "0.0200 nats per token" in sign.seen
