from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

from palate.config import Sampling
from palate.errors import RunError
from palate.making.filters import Left, PromptFilter
from palate.making.prompts import listed, write_prompts
from palate.types import Completion, Finish, Group, Prompt

THINGS = ["tea", "song", "town", "tree", "bird", "game", "book", "soup"]
SEEDS = [f"Which {thing} do you like best?" for thing in THINGS]


class Writer:
    """A snapshot that gives scripted replies, and notes what it is shown."""

    def __init__(self, reply: Callable[[int], tuple[str, Finish]]) -> None:
        self.reply, self.shown = reply, list[Prompt]()
        self.seeds: list[int] = []

    def sample(
        self, prompts: Sequence[Prompt], n: int, sampling: Sampling, *, seed: int, purpose: str
    ) -> Any:
        assert (n, purpose) == (1, "prompt")
        self.seeds.append(seed)
        groups = []
        for prompt in prompts:
            text, finish = self.reply(len(self.shown))
            self.shown.append(prompt)
            groups.append(Group(prompt, (Completion(text, (1,), finish),)))
        return groups


def write(writer: Writer, count: int, sieve: PromptFilter | None = None, **options: Any) -> list[str]:
    sieve = sieve or PromptFilter(SEEDS)
    made = write_prompts(writer, SEEDS, count, sieve, Sampling(), seed=options.pop("seed", 0), **options)  # type: ignore[arg-type]
    return [prompt.text for prompt in made.prompts]


def numbered(i: int) -> tuple[str, Finish]:
    a, b, c = (f"{word}{i}" for word in ("Ant", "bee", "cat"))
    return f" {a} sells {b} cheap {c}?\n10. Why {c} {b} over {a} then?\n11. Cut off in the mid", "length"


def test_new_prompts_are_the_items_that_continue_the_list() -> None:
    sieve = PromptFilter(SEEDS)
    kept = write(Writer(numbered), 5, sieve)
    assert kept[:3] == [
        "Ant0 sells bee0 cheap cat0?",
        "Why cat0 bee0 over Ant0 then?",
        "Ant1 sells bee1 cheap cat1?",
    ]
    assert len(kept) == 5
    assert sieve.left_out == {Left.TRUNCATED: 16}  # each reply of the first batch


def test_examples_are_seeds_and_kept_prompts_alone() -> None:
    writer = Writer(numbered)
    kept = write(writer, 40)
    for i, prompt in enumerate(writer.shown):
        user, assistant = prompt.content
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        *items, begun = assistant["content"].split("\n")
        assert begun == "9."
        shown = [item.partition(". ")[2] for item in items]
        own = [text for text in shown if text not in SEEDS]
        assert len(set(shown)) == 8
        assert len(own) == (0 if i < 16 else 2)
        assert set(own) <= set(kept)


def test_more_prompts_begin_with_the_same_ones() -> None:
    first, more = Writer(numbered), Writer(numbered)
    assert write(first, 20) == write(more, 50)[:20]
    assert len(set(more.seeds)) == len(more.seeds)
    assert first.seeds == more.seeds[: len(first.seeds)]
    assert [p.id for p in first.shown] == [p.id for p in more.shown[: len(first.shown)]]
    other = Writer(numbered)
    write(other, 20, seed=1)
    assert other.seeds[0] != first.seeds[0]
    assert other.shown[0].id != first.shown[0].id


def test_a_writer_that_only_repeats_gives_up_with_its_counts() -> None:
    kept: list[str] = []
    with pytest.raises(
        RunError, match=r"no usable prompt in 128 replies in a row, after 1 of 3 .*143 duplicate|duplicate"
    ):
        write(Writer(lambda i: ("Where do all the birds sleep?", "eos")), 3, kept=kept)
    assert kept == ["Where do all the birds sleep?"]


@pytest.mark.parametrize(
    ("reply", "items"),
    [
        ("One thing\n10. Two things\n11) Three", ["One thing", "Two things", "Three"]),
        ("Split over\n   two lines\n10. Next", ["Split over two lines", "Next"]),
        ("\n10. After nothing", ["After nothing"]),
        ("It costs 3. That is all", ["It costs 3. That is all"]),  # a number within a line is no item
        ("What is it?\n12:30 is when I meet\n10. Next", ["What is it? 12:30 is when I meet", "Next"]),
        ("Read this:\n\nA text\n10.Next", ["Read this: A text", "Next"]),
        ("How much?\n\n3.5 or 4\n10. Next\n\nPlease add more requests.", ["How much? 3.5 or 4", "Next"]),
        ("Mend this text:\n\nI has a cat", ["Mend this text: I has a cat"]),
        ("One\n10. Two\n\nAdd to the list:\n1. Three\n2. Four", ["One", "Two", "Three", "Four"]),
        ("Here are more requests:\n\n9. One\n10. Two", ["One", "Two"]),
        ("Sure! Here you go.\n1. One\n2. Two", ["One", "Two"]),
        ("", []),
    ],
)
def test_listed(reply: str, items: list[str]) -> None:
    assert listed(reply, 9, truncated=False) == items
    assert listed(reply, 9, truncated=True) == items[:-1] or reply == ""


def test_an_empty_reply_is_counted() -> None:
    sieve = PromptFilter()
    assert listed(" \n", 9, truncated=False, sieve=sieve) == []
    assert sieve.left_out == {Left.EMPTY: 1}
