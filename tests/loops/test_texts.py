from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from palate.errors import DataError
from palate.learn import Policy
from palate.loops.texts import check_columns, from_column, warn_of_long_texts, with_targets
from palate.testing import tiny_policy
from palate.types import AnchoredPair, Completion, Pair, Prompt


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


@pytest.mark.parametrize(("longer", "told"), [(2, False), (3, True)])
def test_many_texts_longer_than_the_samples_are_told(longer: int, told: bool) -> None:
    texts = [Completion("", (1,) * (9 if i < longer else 8)) for i in range(10)]
    said: list[str] = []
    run = SimpleNamespace(display=SimpleNamespace(say=said.append))
    warn_of_long_texts(texts, 8, run)  # type: ignore[arg-type]
    assert bool(said) == told
    assert all("3 of 10 texts of the data are longer than max_new_tokens (8)" in line for line in said)
