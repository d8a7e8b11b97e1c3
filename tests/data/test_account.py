from __future__ import annotations

import pytest

from palate.data import Account
from palate.data.account import quantiles


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], {}),
        ([7], {"shortest": 7, "10 %": 7, "median": 7, "90 %": 7, "99 %": 7, "longest": 7}),
        (
            list(range(100, 0, -1)),
            {"shortest": 1, "10 %": 10, "median": 50, "90 %": 90, "99 %": 99, "longest": 100},
        ),
    ],
)
def test_quantiles(values: list[int], expected: dict[str, int]) -> None:
    assert quantiles(values) == expected


def test_two_lines_say_how_much_is_used() -> None:
    account = Account(rows=1200, lengths=[3, 5, 1000])
    assert list(account.overview()) == [
        "1,200 rows, all of them used",
        "tokens per row: median 5, 90th percentile 1,000, longest 1,000",
    ]
    assert list(account.lines()) == []
    account.drop("the same", "a:1")
    assert next(account.overview()) == "1,199 of 1,200 rows are used"
    assert account.summary()["used"] == 1199
    assert account.summary()["tokens"]["longest"] == 1000


def test_parts_that_are_not_used_are_kept_by_row_if_asked() -> None:
    for account, expected in (
        (Account(by_row=True), {"a:1": ["column 'x'", "tools"], "a:2": ["tools"]}),
        (Account(), {}),
    ):
        account.leave("column 'x'", "a:1")
        account.leave("tools", "a:1")
        account.leave("tools", "a:2")
        assert account.unused_of == expected
        assert str(account.unused["tools"]) == "2 rows, first a:1"
