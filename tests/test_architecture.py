"""The house rules that a machine can check (docs/architecture.md)."""

from __future__ import annotations

import ast
import difflib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import palate
from palate.methods import METHODS

SOURCE = Path(str(palate.__file__)).parent
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}

LAYERS = (
    ("errors", "types", "metrics", "declared", "near", "given", "quiet", "beside", "spinning", "eventloop"),
    ("config", "memory", "rundir", "world"),
    ("settings",),
    ("losses", "advantages", "select", "data", "journal", "statistics", "winrates", "bestofn", "textstats"),
    ("model", "effects"),
    ("annotate",),
    ("learn",),
    ("run", "evaluate", "making"),
    ("calibration", "ranking", "pool"),
    ("recipe", "spending", "agreement"),
    ("method",),
    ("loops",),
    ("methods", "article"),
    ("arguments", "report"),
    ("launch", "testing", "inspection", "labelling"),
    ("evaluation", "planning", "pooling"),
    ("comparison",),
    ("cli",),
)
"""From the bottom. A part imports from the layers below its own, and nothing from its neighbours."""
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}

MOST_LINES, LONGEST_FUNCTION, PAGE = 400, 60, 50
COPY, SHORTEST_COPY = 0.9, 8

Function = ast.FunctionDef | ast.AsyncFunctionDef


def part_of(file: str) -> str:
    """`model` of `model/codec.py`, `select` of `select.py`."""
    return file.split("/")[0].removesuffix(".py")


def imports(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Every module that is imported anywhere in a file, in functions too, with the line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            if node.module == "palate":  # `from palate import evaluate`
                yield from ((f"palate.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield str(node.module), node.lineno


def functions(tree: ast.AST) -> Iterator[Function]:
    return (node for node in ast.walk(tree) if isinstance(node, Function))


# ---- Layers ----------------------------------------------------------------------------------------


def test_every_part_has_a_layer() -> None:
    # A new module must be given a place before it can import, or be imported.
    assert {part_of(file) for file in TREES} == HEIGHT.keys() | {"__init__", "__main__"}


def faults(file: str, tree: ast.AST) -> list[str]:
    """Imports of our own that do not point down."""
    mine = part_of(file)
    if mine == "__main__":
        return []
    found = []
    for module, line in imports(tree):
        if module.split(".")[0] != "palate":
            continue
        theirs = module.split(".")[1] if "." in module else "__init__"
        if (mine, theirs) == ("__init__", "spinning"):
            continue  # the package's one effect on import: it must come before torch
        if theirs != mine and HEIGHT.get(theirs, 99) >= HEIGHT.get(mine, -1):
            found.append(f"{file}:{line} imports {module}")
    return found


@pytest.mark.parametrize("file", TREES)
def test_imports_point_down(file: str) -> None:
    assert faults(file, TREES[file]) == []


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("select/pairs.py", "import palate.run"),
        ("losses/token.py", "def f():\n    from palate.select import Drop"),
        ("annotate/base.py", "from palate.learn import Policy"),
        ("run/run.py", "from palate.evaluate import compare"),
        ("methods/dpo.py", "from palate import launch"),
        ("model/load.py", "from palate import Policy"),
        ("types.py", "from palate.errors import PalateError"),
        ("__init__.py", "from palate.types import Group"),
        ("cli/app.py", "from palate.unheard import of"),
    ],
)
def test_an_import_that_points_up_is_found(file: str, code: str) -> None:
    assert faults(file, ast.parse(code))


@pytest.mark.parametrize(
    ("file", "code"),
    [
        ("cli/app.py", "from palate.launch import train"),
        ("model/load.py", "from palate.model.codec import Codec\nimport torch"),
    ],
)
def test_an_import_that_points_down_is_none(file: str, code: str) -> None:
    assert faults(file, ast.parse(code)) == []


@pytest.mark.parametrize("file", [f for f in TREES if part_of(f) in ("losses", "advantages", "select")])
def test_pure_parts_import_no_more_than_torch(file: str) -> None:
    allowed = {"torch", "palate", "__future__", "collections", "dataclasses", "enum", "math", "operator",
               "random", "types", "typing", "lazy_loader"}  # fmt: skip
    assert {module.split(".")[0] for module, _ in imports(TREES[file])} <= allowed
    ours = {module for module, _ in imports(TREES[file]) if module.startswith("palate")}
    own = {m for m in ours if m.startswith(f"palate.{part_of(file)}.")}
    assert ours - own <= {"palate.types", "palate.errors"}


# ---- Size ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=TREES)
def test_files_are_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MOST_LINES


def length(function: Function) -> int:
    """Lines from `def` to the end, the docstring left out: explaining is free."""
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    if ast.get_docstring(function) is not None:
        first = function.body[0]
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines


@pytest.mark.parametrize("file", [f"methods/{name.replace('-', '_')}.py" for name in METHODS])
def test_the_algorithm_of_a_method_is_one_page(file: str) -> None:
    # Its numbers, its prose and its declared spending do not count: a method may have many options.
    code = [
        node for node in TREES[file].body if isinstance(node, Function) and not node.name.startswith("spends")
    ]
    assert sum(map(length, code)) <= PAGE


@pytest.mark.parametrize("file", TREES)
def test_functions_are_short(file: str) -> None:
    long = {f.name: length(f) for f in functions(TREES[file]) if length(f) > LONGEST_FUNCTION}
    assert long == {}


# ---- What is not done ------------------------------------------------------------------------------


@pytest.mark.parametrize("file", TREES)
def test_errors_are_not_swallowed(file: str) -> None:
    # Only code that is not ours, a user's reward function, may raise anything.
    caught = [
        f"{file}:{node.lineno}"
        for node in ast.walk(TREES[file])
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or {"Exception", "BaseException"} & set(names(node.type)))
    ]
    assert caught == [] or file == "annotate/function.py"


def names(tree: ast.AST) -> list[str]:
    return [node.id for node in ast.walk(tree) if isinstance(node, ast.Name)]


UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
UNSAFE_CALLS = {"torch.load", "yaml.load", "yaml.unsafe_load", "yaml.full_load", "eval", "exec"}


def unsafe(tree: ast.AST) -> list[str]:
    """Whatever runs code out of a file that is read."""
    calls = [ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)]
    aliases = [f"{node.module}.{alias.name}" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)
               for alias in node.names]  # fmt: skip
    found = [call for call in (*calls, *aliases) if call in UNSAFE_CALLS]
    return found + [module for module, _ in imports(tree) if module.split(".")[0] in UNSAFE_MODULES]


@pytest.mark.parametrize("file", TREES)
def test_nothing_is_read_that_could_run_code(file: str) -> None:
    assert unsafe(TREES[file]) == []


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from joblib import load",
        "import torch\nx = torch.load('a', weights_only=True)",
        "def f():\n    return yaml.load(text, Loader=yaml.Loader)",
        "from torch import load",
        "eval('1')",
    ],
)
def test_what_could_run_code_is_found(code: str) -> None:
    assert unsafe(ast.parse(code))


# ---- Copies ----------------------------------------------------------------------------------------


def bodies(trees: dict[str, ast.Module]) -> list[tuple[str, Function, str]]:
    """File, function and body, docstring left out, of every function that is long enough to count."""
    found = []
    for file, tree in trees.items():
        for function in functions(tree):
            body = function.body[1:] if ast.get_docstring(function) is not None else function.body
            text = "\n".join(map(ast.unparse, body))
            if len(text.splitlines()) >= SHORTEST_COPY:
                found.append((file, function, text))
    return found


def encloses(one: Function, other: Function) -> bool:
    """Whether one of the two, of the same file, is defined within the other."""
    outer, inner = sorted((one, other), key=lambda f: f.lineno)
    return inner.lineno <= (outer.end_lineno or 0)


def copies(trees: dict[str, ast.Module]) -> list[str]:
    """Pairs of functions of which one is nearly the other."""
    found, every = [], bodies(trees)
    # Letters that both have, in any order, bound the ratio from above; few pairs need the real comparison.
    letters = np.array([np.bincount([ord(c) % 256 for c in text], minlength=256) for _, _, text in every])
    sizes = letters.sum(1)
    for i, (file, one, mine) in enumerate(every):
        shared = np.minimum(letters[i], letters[i + 1 :]).sum(1)
        for j in np.flatnonzero(2 * shared >= COPY * (sizes[i] + sizes[i + 1 :])) + i + 1:
            other_file, other, theirs = every[j]
            if file == other_file and encloses(one, other):
                continue  # a function within another is no copy of it
            if difflib.SequenceMatcher(None, mine, theirs, autojunk=False).ratio() >= COPY:
                found.append(f"{file}:{one.lineno} {one.name} and {other_file}:{other.lineno} {other.name}")
    return found


def test_no_function_is_nearly_another() -> None:
    assert len(bodies(TREES)) > 30
    assert copies(TREES) == []


def test_a_copy_with_other_names_is_found() -> None:
    code = ast.unparse(next(f for f in functions(TREES["model/rollouts.py"]) if f.name == "begin"))
    trees = {
        "a.py": ast.parse(code),
        "b.py": ast.parse(code.replace("def begin", "def draw").replace("n:", "k:")),
    }
    assert len(copies(trees)) == 1
