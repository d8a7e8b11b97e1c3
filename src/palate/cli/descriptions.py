"""The docstring under a field of a configuration class, used as the help text of its flag.

pydantic can read these docstrings too, but then it parses the source for every class it creates. This module
parses each file once, and only when flags are created.
"""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from palate.config import Config


def description(cls: type[Config], field: str) -> str:
    """Return the docstring under a field; a class that changes only the default inherits the docstring."""
    parts = (part for part in cls.__mro__ if issubclass(part, Config) and part is not Config)
    written = next((text for part in parts if (text := _texts(part).get(field))), "")
    return written or cls.model_fields[field].description or ""


def _texts(cls: type[Config]) -> Mapping[str, str]:
    module = sys.modules.get(cls.__module__)
    file = getattr(module, "__file__", None)
    return {} if file is None else _classes(file).get(cls.__qualname__, {})


@cache
def _classes(file: str) -> dict[str, dict[str, str]]:
    """Return the docstrings of all fields in a file: by qualified class name, then by field name."""
    return dict(_described(ast.parse(Path(file).read_bytes()), ""))


def _described(node: ast.AST, prefix: str) -> Iterator[tuple[str, dict[str, str]]]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.ClassDef(name=name):
                yield f"{prefix}{name}", _texts_in(child)
                yield from _described(child, f"{prefix}{name}.")
            case ast.FunctionDef(name=name):
                yield from _described(child, f"{prefix}{name}.<locals>.")
            case ast.stmt():
                yield from _described(child, prefix)


def _texts_in(node: ast.ClassDef) -> dict[str, str]:
    """Return the string that follows each annotated name in the body of a class."""
    texts = {}
    for first, second in zip(node.body, node.body[1:], strict=False):
        match first, second:
            case (
                ast.AnnAssign(target=ast.Name(id=name)),
                ast.Expr(value=ast.Constant(value=str(text))),
            ):
                texts[name] = inspect.cleandoc(text)
    return texts
