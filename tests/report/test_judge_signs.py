from __future__ import annotations

from collections.abc import Callable

import pytest

from palate.report.judge_signs import position_decides
from palate.report.signs import signs
from palate.rundir import RunRecord

Record = Callable[..., RunRecord]


@pytest.mark.parametrize(("late", "level"), [(0.1, None), (0.3, "note"), (0.9, "worry")])
def test_a_judge_that_decides_by_position(record: Record, late: float, level: str | None) -> None:
    run = record({"judge/orders_disagree": [0.0] * 6 + [late] * 2})
    sign = position_decides(run)
    assert (sign and sign.level) == level
    assert (sign is not None) == ("position_decides" in {one.key for one in signs(run)})


def test_a_run_without_a_judge(record: Record) -> None:
    assert position_decides(record({"loss": [1.0] * 8})) is None
