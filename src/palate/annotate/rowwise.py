"""Recognise functions that handle their rows one after another, from their source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType
from typing import Any


def constants_of(function: Callable[..., Any]) -> frozenset[str] | None:
    """Return the arguments that a function reads as constants, if it handles one row after another.

    Such a function is one loop over its arguments, and the loop reads them only through its own variables:
    `return [judge(c) for c in completions]`, or the same as a `for` statement that appends to a list. It
    gives the same rewards if it is called once per row, as long as the returned arguments keep their
    defaults. The result is None for a function that is not recognised: one that hands a whole list on, to a
    pool or a model, that compares rows, or whose source is not available.
    """
    if inspect.ismethod(function):
        function = function.__func__
    elif not isinstance(function, FunctionType):
        function = vars(type(function)).get("__call__", function)
    # A decorator may do anything with the rows, and the source is that of the function below it.
    if not isinstance(function, FunctionType) or hasattr(function, "__wrapped__"):
        return None
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    if not isinstance(definition, ast.FunctionDef | ast.AsyncFunctionDef) or definition.decorator_list:
        return None
    given = definition.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
    lists = {argument.arg for argument in arguments}
    keywords = {given.kwarg.arg} if given.kwarg else set()
    used = _used_in_loop(definition, lists, keywords)
    if used is None:
        return None
    used -= {argument.arg for argument in arguments[:1] if argument.arg == "self"}
    defaults = len(given.defaults)
    plain = [*given.posonlyargs, *given.args]
    optional = {argument.arg for argument in plain[len(plain) - defaults :]} | {
        argument.arg for argument, value in zip(given.kwonlyargs, given.kw_defaults, strict=True) if value
    }
    constants = used & (lists | keywords)
    return frozenset(constants) if constants <= optional else None


def _used_in_loop(
    definition: ast.FunctionDef | ast.AsyncFunctionDef, lists: set[str], keywords: set[str]
) -> set[str] | None:
    """Return the names that the loop's body uses; None if the function is not a loop over its arguments."""
    match _without_docstring(definition.body):
        case [ast.Return(ast.ListComp(element, [ast.comprehension(target, rows, [], 0)]))]:
            body: list[ast.AST] = [element]
        case [
            ast.Assign([ast.Name(results)], ast.List([])) | ast.AnnAssign(ast.Name(results), _, ast.List([])),
            ast.For(target, rows, statements, []),
            ast.Return(ast.Name(returned)),
        ] if returned == results and _only_appends(statements, results):
            body = [*statements]
        case _:
            return None
    return _names(target).union(*map(_names, body)) if _are_rows(rows, lists, keywords) else None


def _without_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    match body:
        case [ast.Expr(ast.Constant(str())), *rest]:
            return rest
    return body


def _are_rows(rows: ast.expr, single: set[str], keywords: set[str]) -> bool:
    """Return whether an expression runs through arguments row by row: one of them, or a zip of some."""
    match rows:
        case ast.Name(name):
            return name in single
        case ast.Subscript(ast.Name(name), ast.Constant(str())):
            return name in keywords
        case ast.Call(ast.Name("zip"), lists, options):
            plain = all(option.arg == "strict" for option in options)
            return plain and all(_are_rows(one, single, keywords) for one in lists)
    return False


def _names(node: ast.AST) -> set[str]:
    return {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}


def _only_appends(body: list[ast.stmt], results: str) -> bool:
    """Return whether a loop's body uses its list only to append to, and does not leave the loop early."""
    parts = [part for statement in body for part in ast.walk(statement)]
    if any(isinstance(part, ast.Break | ast.Return | ast.Yield | ast.YieldFrom) for part in parts):
        return False
    appends = 0
    for part in parts:
        match part:
            case ast.Call(ast.Attribute(ast.Name(name), "append"), [_], []) if name == results:
                appends += 1
    return appends == sum(isinstance(part, ast.Name) and part.id == results for part in parts)
