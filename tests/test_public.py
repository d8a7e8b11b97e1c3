from __future__ import annotations

import ast
import importlib
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import palate

ROOT = Path(str(palate.__file__)).parent
STUBS = sorted(ROOT.rglob("__init__.pyi"))


def listed(stub: Path) -> dict[str, tuple[str, ...]]:
    """The names in a package's list, by the module that each comes from."""
    homes: dict[str, tuple[str, ...]] = {}
    for node in ast.parse(stub.read_text(encoding="utf-8")).body:
        assert isinstance(node, ast.ImportFrom)
        assert node.level == 1
        for alias in node.names:
            assert alias.asname == alias.name  # else type checkers take it for private
            homes[str(node.module)] = (*homes.get(str(node.module), ()), alias.name)
    return homes


@pytest.mark.parametrize("stub", STUBS, ids=lambda stub: stub.parent.name)
def test_a_package_has_the_names_of_its_list(stub: Path) -> None:
    name = ".".join(["palate", *stub.parent.relative_to(ROOT).parts])
    package = importlib.import_module(name)
    for module, names in listed(stub).items():
        home = importlib.import_module(f"{name}.{module}")
        assert [getattr(package, each) for each in names] == [getattr(home, each) for each in names]
    names = [each for names in listed(stub).values() for each in names]
    assert len(names) == len(set(names))
    assert sorted(package.__all__) == sorted(names) == dir(package)


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


@pytest.mark.parametrize("module", listed(ROOT / "__init__.pyi"))
def test_names_come_from_a_modules_public_ones(module: str) -> None:
    names = listed(ROOT / "__init__.pyi")[module]
    home = importlib.import_module(f"palate.{module}")
    assert all(not name.startswith("_") for name in names)
    if hasattr(home, "__all__"):
        assert set(names) <= set(home.__all__)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(AttributeError, match="palate attribute train_model"):
        palate.train_model  # noqa: B018
    assert not hasattr(palate, "__path_that_is_no_name__")


def modules_after(code: str) -> set[str]:
    """What a fresh Python has imported after running the code."""
    source = str(Path(str(palate.__file__)).parents[1])
    program = f"import sys; sys.path.insert(0, {source!r})\n{code}\nprint(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stderr.split())


SLOW = {"torch", "transformers", "peft", "accelerate", "datasets", "pyarrow", "scipy", "numpy", "matplotlib"}
HEAVY = SLOW | {"pydantic"}
EVERY_CONFIG = """
import palate.config, palate.errors, palate.types, palate.calibration
for method in palate.methods.METHODS.values():
    for way in method.ways:
        values = {"data": "x", "variant": way.variants[0]} if way.variants else {"data": "x"}
        assert type(method.configure(values)) is way.config
"""


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


def test_the_configuration_of_every_method_loads_without_torch() -> None:
    loaded = modules_after("import palate.methods" + EVERY_CONFIG)
    assert "palate.methods.rso" in loaded
    assert not loaded & SLOW


def test_what_follows_from_the_methods_is_up_to_date() -> None:
    script = ROOT.parents[1] / "docs" / "methods" / "generate.py"
    done = subprocess.run([sys.executable, str(script), "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_methods_are_all_public_configurations() -> None:
    configs = {way.config.__name__ for method in palate.METHODS.values() for way in method.ways}
    assert configs <= set(palate.__all__)
