from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import palate


def test_all_is_what_is_there() -> None:
    listed = [name for names in palate._HOME.values() for name in names]
    assert len(listed) == len(set(listed))
    assert set(palate.__all__) == set(listed)
    assert len(palate.__all__) == len(set(palate.__all__))
    assert dir(palate) == sorted(palate.__all__)


@pytest.mark.parametrize("name", palate.__all__)
def test_every_name_can_be_had_and_is_explained(name: str) -> None:
    value = getattr(palate, name)
    if name == "METHODS":  # a mapping; its text stands under it
        return
    doc = inspect.getdoc(value)
    assert doc
    # A dataclass without a docstring gets its signature for one.
    assert not doc.startswith(f"{name}("), name
    assert value.__module__.startswith("palate.")


@pytest.mark.parametrize("module", palate._HOME)
def test_names_come_from_a_modules_public_ones(module: str) -> None:
    home = importlib.import_module(f"palate.{module}")
    assert all(not name.startswith("_") for name in palate._HOME[module])
    if hasattr(home, "__all__"):
        assert set(palate._HOME[module]) <= set(home.__all__)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(palate.__file__)).read_text(encoding="utf-8"))
    (block,) = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    seen = {
        str(node.module).removeprefix("palate."): tuple(alias.name for alias in node.names)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
    }
    assert seen == palate._HOME


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="module 'palate' has no attribute 'train_model'"):
        palate.train_model  # noqa: B018
    assert not hasattr(palate, "__path_that_is_no_name__")


def modules_after(code: str) -> set[str]:
    """What a fresh Python has imported after running the code."""
    source = str(Path(str(palate.__file__)).parents[1])
    program = f"import sys; sys.path.insert(0, {source!r})\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


HEAVY = {"torch", "transformers", "peft", "datasets", "pyarrow", "scipy", "numpy", "pydantic"}


@pytest.mark.parametrize(
    "code",
    [
        "import palate",
        "import palate; palate.PalateError; palate.Prompt; palate.ConfigError",
        "from palate.cli import main; assert main(['--version']) == 0",
        "from palate.cli import main; assert main(['--beta']) == 2",
    ],
)
def test_what_needs_no_torch_does_not_wait_for_it(code: str) -> None:
    assert not modules_after(code) & HEAVY


def test_methods_are_all_public_configurations() -> None:
    configs = {method.config.__name__ for method in palate.METHODS.values()}
    assert configs <= set(palate.__all__)
