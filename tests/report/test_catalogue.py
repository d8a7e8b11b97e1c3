from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from palate.report.catalogue import PANELS
from palate.report.curves import Curve
from palate.rundir import RunRecord

Record = Callable[..., RunRecord]


def test_keys_and_metrics_are_named_once() -> None:
    assert max(Counter(panel.key for panel in PANELS).values()) == 1
    drawn = Counter(curve.metric for panel in PANELS for curve in panel.curves)
    assert [metric for metric, count in drawn.items() if count > 1] == []


def test_rates_are_compared_with_a_coin_or_with_nothing() -> None:
    assert {panel.guide for panel in PANELS if panel.rate} == {0.5, None}


def test_a_band_is_as_wide_as_its_bounds_are_far(record: Record) -> None:
    run = record({"x": [0.5, 0.75], "low": [0.25], "high": [1.0]})
    line = Curve("x", bounds=("low", "high")).read(run)
    assert line.band == ((0.25, 0.0), (0.5, 0.0))  # where a bound is missing, there is no width
    assert Curve("x").read(run).band is None


@pytest.mark.parametrize(("metric", "once"), [("pairs/kept", True), ("loss", False), ("objective/kl", False)])
def test_what_was_drawn_once(record: Record, metric: str, once: bool) -> None:
    run = record({metric: [2.0, 2.0], "candidates/kept": [8, 8]})
    assert Curve(metric).read(run).once == once
    assert not Curve(metric).read(record({metric: [2.0]})).once
