from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from palate.data import Account
from palate.errors import DataError
from palate.learn import Policy
from palate.loops.records import REPEATED, content_key, distinct, records_of
from palate.testing import tiny_policy
from palate.types import Comparison, Completion, Example, Pair, Prompt

SAME_WHEN_CUT = Comparison(Prompt("cut"), "a" * 40 + "b", "a" * 40 + "c")


def pairs_of(policy: Policy, rows: Sequence[Comparison], source: str, account: Account) -> list[Pair]:
    return distinct(records_of(policy, rows, source, account, policy.model.codec.pair), source, account)


def test_pairs_that_become_equal_by_being_cut_are_left_out_and_counted(tiny: str) -> None:
    policy = tiny_policy(Path(tiny), model={"max_length": 40})
    fine = Comparison(Prompt("fine"), "yes", "no", margin=2.0)
    account = Account(rows=2)
    pairs = pairs_of(policy, [SAME_WHEN_CUT, fine], "data.jsonl", account)
    assert [(p.prompt.text, p.chosen.text, p.rejected.text, p.margin) for p in pairs] == [
        ("fine", "yes", "no", 2.0)
    ]
    assert account.dropped_rows == 1
    with pytest.raises(DataError, match=r"data\.jsonl: after truncation to the model's context"):
        pairs_of(policy, [SAME_WHEN_CUT], "data.jsonl", Account(rows=1))


def test_lengths_and_repeats_are_counted(tiny: str) -> None:
    policy = tiny_policy(Path(tiny))
    rows = [Comparison(Prompt("q", where=f"f:{n}"), text, "no") for n, text in enumerate(("yes", "y", "yes"))]
    account = Account(rows=3)
    pairs = pairs_of(policy, rows, "f", account)
    before = len(policy.model.codec.prompt_ids(Prompt("q")))
    # The longer one of the two, with its end.
    assert list(account.lengths) == [before + 4, before + 3, before + 4]
    assert [(text, str(tally)) for text, tally in account.notes.items()] == [(REPEATED, "1 row, first f:2")]
    assert len(pairs) == 3
    asked = [Prompt("q", {"wanted": wanted}, f"f:{wanted}") for wanted in "aba"]
    account = Account(rows=3)
    assert records_of(policy, asked, "f", account, lambda prompt: prompt) == asked
    assert list(account.lengths) == [before] * 3
    assert str(account.notes[REPEATED]) == "1 row, first f:a"


def test_a_key_tells_contents_columns_and_order() -> None:
    prompt = Prompt("p", {"wanted": "e"}, "a.jsonl:1")
    example = Example(prompt, Completion("x", (1, 2)))
    key = content_key([prompt, example])
    assert key == content_key(
        [replace(prompt, where="b.jsonl:7"), example]
    )  # where it was read is nothing to it
    others = [
        [example, prompt],
        [prompt],
        [replace(prompt, columns={"wanted": "f"}), example],
        [prompt, replace(example, completion=Completion("x", (1, 3)))],
        [replace(prompt, content="q"), example],
    ]
    assert len({key, *map(content_key, others)}) == 6


def test_a_key_tells_margins() -> None:
    pair = Pair(Prompt("p"), Completion("x", (1,)), Completion("y", (2,)))
    keys = {content_key([replace(pair, margin=margin)]) for margin in (None, 0.5, 1.0)}
    assert len(keys) == 3
