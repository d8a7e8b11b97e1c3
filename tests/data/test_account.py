from __future__ import annotations

import json
from array import array

import pytest

from palate.data import Account
from palate.data.account import quantiles
from palate.errors import DataError


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
    account = Account(rows=1200, lengths=array("i", [3, 5, 1000]))
    assert list(account.overview()) == [
        "1,200 rows, all of them used",
        "tokens per row: median 5, 90th percentile 1,000, longest 1,000",
    ]
    assert list(account.lines()) == []
    account.drop("the same", "a:1")
    assert next(account.overview()) == "1,199 of 1,200 rows are used"
    assert account.summary()["used"] == 1199
    assert account.summary()["tokens"]["longest"] == 1000


def test_an_account_comes_back_from_json_and_bytes() -> None:
    account = Account(rows=4, lengths=array("i", [3, 5, 1000]))
    account.skip(DataError("a:2: no answer"))
    account.note("truncated", "a:3")
    again = Account()
    again.restore(json.loads(json.dumps(account.saved())), account.lengths.tobytes())
    assert again == account
    # One number per row is too much for JSON, whose numbers a reader keeps as objects.
    assert "lengths" not in account.saved()


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


@pytest.mark.parametrize(("rows", "warned"), [(2, False), (3, True), (10, True)])
def test_mostly_truncated_data_are_a_warning(rows: int, warned: bool) -> None:
    account = Account(rows=10)
    for i in range(rows):
        account.note("answers are truncated at 120 tokens (--max-length)", f"a:{i}")
    account.note("something else", "a:1")
    lines = list(account.warnings())
    assert bool(lines) == warned
    if warned:
        assert lines[0].startswith(
            f"answers are truncated at 120 tokens (--max-length) in {rows * 10}% of the r"
        )


def test_all_thoughts_that_are_lost_count_and_are_named_as_the_data_name_them() -> None:
    account = Account(rows=4)
    for i, key in enumerate(("thinking", "reasoning")):
        account.lose(key, f"a:{i}")
    with pytest.raises(DataError, match=r"thinking of the answers \(1 row, first a:0\) and reasoning of"):
        account.check("a", 4)
    account = Account(rows=4)
    account.lose("thinking", "a:1")
    account.check("a", 4)  # one row is always allowed
