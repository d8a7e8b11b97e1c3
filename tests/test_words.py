"""Plain English: the patterns that readers stumbled over stay out of README, docs, help and messages.

The rates are per 1,000 words of README, docs and docstrings together; help texts are the docstrings under the
fields of configurations. Messages and every other string of the source are searched for the same patterns.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import palate

SOURCE = Path(str(palate.__file__)).parent
ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]

WORD_LISTS = {"annotate/topic.py": "_FUNCTION_WORDS"}
"""Constants that list words and are not prose, by file."""

LIMITS = {
    r"\b(tell|tells|told)\b": 0.15,
    r"\bis no (?!longer\b)[a-z]+\b": 0.2,
    r"\b(go|goes|going|gone|went) on\b": 0.1,
    r"\b(anew|of late|whence|but for|for nothing)\b": 0.1,
}
"""Most occurrences per 1,000 words, by pattern."""
ODD_STARTS = 0.03
"""Most docstrings that begin with a question word, as a share."""
QUESTION = re.compile(r"(What|Whether|Who|How|Where|Whose|Which)\b")
SENTENCE_OF = re.compile(r"(?:^|[.!?]\s+)Of (?!course\b)")
"""A sentence that begins with "Of ..."."""
NAMES = frozenset({"found", "told", "asked", "of_keys"})
"""Names of variables that do not name the content."""


def documented(tree: ast.AST) -> Iterator[str]:
    """Docstrings of modules, classes and functions, and the texts under fields and constants."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else ():
            match statement:
                case ast.Expr(value=ast.Constant(value=str(text))):
                    yield text


def strings(tree: ast.AST) -> Iterator[str]:
    """Every string of a file, its docstrings included; an f-string's parts joined."""
    inside = {id(part) for n in ast.walk(tree) if isinstance(n, ast.JoinedStr) for part in n.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(p.value if isinstance(p, ast.Constant) else "{}" for p in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in inside:
            yield node.value


def named(tree: ast.AST) -> Iterator[str]:
    """Names of variables and parameters, once for each binding."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.arg):
            yield node.arg


TREES = {
    path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8"))
    for path in sorted(SOURCE.rglob("*.py"))
}
DOCSTRINGS = [text for tree in TREES.values() for text in documented(tree)]


def _without_list(tree: ast.Module, name: str | None) -> ast.Module:
    """The file without the constant of this name."""
    kept = [
        statement
        for statement in tree.body
        if not (isinstance(statement, ast.Assign) and [ast.unparse(t) for t in statement.targets] == [name])
    ]
    return ast.Module(body=kept, type_ignores=[])


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


TEXT = "\n".join([*map(prose, PAGES), *DOCSTRINGS])
WORDS = len(re.findall(r"[A-Za-z][\w'-]*", TEXT))


@pytest.mark.parametrize("pattern", LIMITS)
def test_a_pattern_stays_rare(pattern: str) -> None:
    count = len(re.findall(pattern, TEXT, re.IGNORECASE))
    assert 1000 * count / WORDS <= LIMITS[pattern]


def test_docstrings_begin_with_a_verb_or_a_noun() -> None:
    odd = [text.split("\n")[0] for text in DOCSTRINGS if QUESTION.match(text.strip())]
    assert len(odd) / len(DOCSTRINGS) <= ODD_STARTS, odd


def test_no_sentence_begins_with_of() -> None:
    assert 1000 * len(SENTENCE_OF.findall(TEXT)) / WORDS <= 0.1


@pytest.mark.parametrize("file", TREES)
def test_messages_are_plain(file: str) -> None:
    for text in strings(_without_list(TREES[file], WORD_LISTS.get(file))):
        for pattern in LIMITS:
            assert not re.search(pattern, text, re.IGNORECASE), text


@pytest.mark.parametrize("file", TREES)
def test_names_say_what_they_hold(file: str) -> None:
    assert not NAMES & set(named(TREES[file]))


@pytest.mark.parametrize(
    "text",
    [
        "The user is told of it.",
        "This is no reward.",
        "The run goes on.",
        "It begins anew.",
        "All but for one.",
    ],
)
def test_the_patterns_catch_examples(text: str) -> None:
    assert any(re.search(pattern, text, re.IGNORECASE) for pattern in LIMITS)


def report() -> dict[str, float]:
    """The current rates."""
    rates = {p: round(1000 * len(re.findall(p, TEXT, re.IGNORECASE)) / WORDS, 2) for p in LIMITS}
    odd = sum(bool(QUESTION.match(text.strip())) for text in DOCSTRINGS) / len(DOCSTRINGS)
    bound = [name for tree in TREES.values() for name in named(tree)]
    return {
        **rates,
        "docstrings that begin with a question word": round(odd, 3),
        "sentences that begin with Of": round(1000 * len(SENTENCE_OF.findall(TEXT)) / WORDS, 2),
        **{name: bound.count(name) for name in sorted(NAMES)},
        "words": WORDS,
        "docstrings": len(DOCSTRINGS),
    }


if __name__ == "__main__":
    for name, value in report().items():
        print(f"{value:>8}  {name}")
