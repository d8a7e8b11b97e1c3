from __future__ import annotations

from pathlib import Path

import pytest

from palate.errors import DataError
from palate.learn import Policy
from palate.loops.texts import check_columns, from_column, with_targets
from palate.testing import tiny_policy
from palate.types import AnchoredPair, Pair, Prompt


@pytest.fixture
def policy(tiny: str) -> Policy:
    return tiny_policy(Path(tiny))


def test_a_text_of_the_data_is_an_anchor(policy: Policy) -> None:
    asked = Prompt("q", {"completion": "yes", "turns": [{"role": "assistant", "content": "no"}]})
    pair = Pair(asked, *(policy.model.codec.completion(asked, text) for text in ("good", "bad")))
    (record,) = with_targets(policy, [pair], "completion")
    assert isinstance(record, AnchoredPair)
    assert record.pair == pair
    assert record.anchor == policy.model.codec.completion(asked, "yes")
    assert from_column(policy, asked, "turns").text == "no"


@pytest.mark.parametrize(
    ("columns", "found"),
    [({}, "missing"), ({"gold": ""}, "''"), ({"gold": None}, "None"), ({"gold": 3}, "3")],
)
def test_a_text_that_is_not_there(policy: Policy, columns: dict[str, object], found: str) -> None:
    asked = Prompt("What now?", columns, "data.jsonl:7")
    with pytest.raises(DataError, match=rf"data\.jsonl:7: column 'gold' is {found}; expected .*What now"):
        check_columns(policy, [asked], ["gold"])
