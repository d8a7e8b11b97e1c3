from __future__ import annotations

import itertools
import re
from dataclasses import astuple
from pathlib import Path

import pytest

from palate.article import SOURCE
from palate.methods import METHODS
from palate.recipe import Recipe

POLICY, BOTH = ("policy",), ("policy", "reference")


@pytest.mark.parametrize(
    ("recipe", "cells"),
    [
        (Recipe("human", "data", "once", BOTH, POLICY), ("no", "no", "no", "yes", "2 (1)")),
        (Recipe("model", "current", "each step", BOTH, external=True), ("yes", "yes", "yes", "no", "2")),
        (Recipe("none", "mixed", "each round", BOTH), ("yes", "partly", "yes", "yes", "2")),
        (Recipe("human seed", "start", "once", POLICY, BOTH), ("partly", "partly", "no", "yes", "1 (2)")),
    ],
)
def test_the_answers_follow_from_the_recipe(recipe: Recipe, cells: tuple[str, ...]) -> None:
    assert astuple(recipe.cells) == cells


def test_a_method_that_samples_nothing_is_not_judged_again() -> None:
    for method in METHODS.values():
        if method.recipe.samples == "data":
            assert method.recipe.judged == "once", method.name


def test_the_article_has_fourteen_rows() -> None:
    assert len(SOURCE) == 14
    assert SOURCE.keys() <= METHODS.keys()


def test_its_triangles() -> None:
    # The three that are lost where the article is copied as plain text, and the one that stays.
    unbiased = {name for name, cells in SOURCE.items() if cells.unbiased_data == "partly"}
    assert unbiased == {"rrhf", "click", "spin"}
    assert [n for n, cells in SOURCE.items() if cells.no_human_preferences == "partly"] == ["self-rewarding"]


# Where our cells are others than the article's; docs/methods/README.md says why, for each.
DIFFERENCES = {
    "rlaif": {"models"},
    "rest": {"unbiased_data", "models"},
    "slic-hf": {"unbiased_data", "models"},
    "rso": {"unbiased_data", "models"},
}


def test_where_we_differ_from_the_article() -> None:
    recipes = {m.name: m.recipe for m in METHODS.values()}
    found = {
        name: {q for q, value in vars(cells).items() if value != getattr(recipes[name].cells, q)}
        for name, cells in SOURCE.items()
    }
    assert {name: questions for name, questions in found.items() if questions} == DIFFERENCES


# ---- The page that has the table ---------------------------------------------------------------------

PAGE = (Path(__file__).parents[1] / "docs" / "methods" / "README.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """The rows of the first table whose heading begins so, without marks."""
    lines = iter(PAGE.splitlines())
    next(line for line in lines if line.startswith(f"| {heading} |"))
    rows = itertools.takewhile(lambda line: line.startswith("|"), lines)
    return [re.sub(r"[*`\[\]]|\(\S+\.md\)", "", row).strip("| ").split(" | ") for row in list(rows)[1:]]


def test_the_page_has_the_table() -> None:
    known = {m.name: m for m in METHODS.values()}
    rows = {row[0]: row for row in table("method | learns from")}
    assert rows.keys() == known.keys()
    for name, row in rows.items():
        assert row[2:] == [known[name].group, *astuple(known[name].recipe.cells)], name


def test_the_page_explains_where_we_differ() -> None:
    explained = {(name, column.replace(" ", "_")): cells for name, column, *cells in table("method | column")}
    assert explained.keys() == {
        (name, question) for name, questions in DIFFERENCES.items() for question in questions
    }
    recipes = {m.name: m.recipe for m in METHODS.values()}
    for (name, question), (article, ours, why) in explained.items():
        assert article == getattr(SOURCE[name], question)
        assert ours == getattr(recipes[name].cells, question)
        assert why


def test_every_method_has_its_page() -> None:
    for name in METHODS:
        assert (Path(__file__).parents[1] / "docs" / "methods" / f"{name}.md").is_file(), name
