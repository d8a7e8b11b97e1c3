from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from palate.report.data_signs import data_truncated
from palate.report.signs import signs
from palate.rundir import RunRecord

Record = Callable[..., RunRecord]


def with_data(run: RunRecord, data: Any) -> RunRecord:
    return replace(run, description={**run.description, "data": data})


def account(used: int, **truncated: int) -> dict[str, Any]:
    notes = {
        f"answers are truncated at {limit.removeprefix('at_')} tokens (--max-length)": {
            "rows": n,
            "first": "",
        }
        for limit, n in truncated.items()
    }
    return {"rows": used, "used": used, "notes": {"another note": {"rows": used, "first": ""}} | notes}


@pytest.mark.parametrize(("rows", "level"), [(0, None), (20, None), (21, "note"), (51, "worry")])
def test_data_that_are_mostly_truncated(record: Record, rows: int, level: str | None) -> None:
    run = with_data(record(), {"a.jsonl": account(100), "b.jsonl": account(100, at_120=rows)})
    sign = data_truncated(run)
    assert (sign and sign.level) == level
    if sign is not None:
        assert sign.seen.startswith(f"b.jsonl: in {rows} of 100 rows")
        assert "--max-length" in sign.do
        assert sign in signs(run)


@pytest.mark.parametrize("data", [None, "x", ["x"], {"a": "x"}, {"a": {"used": 0, "notes": None}}])
def test_without_an_account_there_is_no_sign(record: Record, data: Any) -> None:
    assert data_truncated(with_data(record(), data)) is None
