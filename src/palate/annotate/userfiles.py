"""Python files of users, as modules that child processes can import by name.

A reward may use a process pool, which pickles functions by the name of their module. So a file becomes the
submodule of this module whose name is the file's path in hexadecimal digits. A forked process has the module
already. A process started otherwise imports this module first, and this module finds the file by its name.
The name cannot be that of another module, whatever the file is called.
"""

from __future__ import annotations

import ast
import importlib.util
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from palate.errors import AnnotatorError

__path__: list[str] = []
"""Marks this module as one that has submodules."""

_read_at: dict[str, tuple[int, int]] = {}
"""The time and size of each file when it was imported, by the name of its module."""


def import_file(path: Path) -> ModuleType:
    """Return the module of a file. It is imported once, and again after the file has changed.

    Modules beside the file can be imported in it: its folder becomes the last entry of `sys.path`.

    Raises:
        AnnotatorError: the file imports a module beside it whose name belongs to an installed module.
        Exception: the code of the file raises it.
    """
    path = path.resolve()
    name = module_name(path)
    status = path.stat()
    stamp = (status.st_mtime_ns, status.st_size)
    if _read_at.get(name) != stamp:
        sys.modules.pop(name, None)
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that a file hides no installed package
        importlib.invalidate_caches()
    _refuse_hidden_neighbours(path)
    module = importlib.import_module(name)
    _read_at[name] = stamp
    return module


def module_name(path: Path) -> str:
    """Return the name of a file's module."""
    return f"{__name__}.x{str(path).encode().hex()}"


class _Finder:
    """Finds the file that a module's name states."""

    @staticmethod
    def find_spec(name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Return the file's specification; None for any other module."""
        start = f"{__name__}.x"
        if not name.startswith(start):
            return None
        try:
            file = bytes.fromhex(name.removeprefix(start)).decode()
        except ValueError:
            return None
        return importlib.util.spec_from_file_location(name, file)


if _Finder not in sys.meta_path:
    sys.meta_path.append(_Finder)


def _refuse_hidden_neighbours(path: Path) -> None:
    """Raise AnnotatorError if an import in the file means a neighbour but finds an installed module."""
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return  # the import reports it
    for name in sorted(_imported(tree)):
        places = (path.parent / f"{name}.py", path.parent / name / "__init__.py")
        neighbour = next((place for place in places if place.is_file()), None)
        if neighbour is None or neighbour == path:
            continue
        origin = _origin(name)
        if origin != str(neighbour):
            raise AnnotatorError(
                f"reward file {str(path)!r} imports {name!r}, which is a file beside it and also an "
                f"installed module ({origin}); rename {neighbour.name if neighbour.stem == name else name}"
            )


def _imported(tree: ast.AST) -> set[str]:
    """Return the first parts of the names of all modules that code imports."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.partition(".")[0])
    return names


def _origin(name: str) -> str | None:
    """Return the file of a module, without importing it."""
    try:
        spec = importlib.util.find_spec(name)
    except ValueError:  # a module without specification, such as `__main__`
        return None
    origin = None if spec is None else spec.origin
    return str(Path(origin).resolve()) if origin and Path(origin).is_file() else origin
