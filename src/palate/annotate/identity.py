"""A key of a Python object's code, so that a run can refuse to resume with another reward."""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Mapping
from typing import Any

from palate.memory import key_of

_PLAIN = (str, int, float, bool, bytes, type(None))


def code_key(reward: Any) -> str:
    """Return a key of a function or a callable object, from its name, source and plain values.

    A function counts by its qualified name, its source (its compiled code where the source is not available),
    its defaults, and the variables that it encloses. An object counts by its class and its attributes;
    attributes whose name begins with `_` hold changing state and do not count. Values are numbers, texts, and
    containers of these; for other values only the type counts. Names that the code looks up in its module do
    not count.
    """
    return key_of(_facts(reward, seen=set()))


def _facts(value: Any, seen: set[int]) -> Any:
    if isinstance(value, _PLAIN):
        return [type(value).__name__, repr(value)]
    if id(value) in seen:
        return type(value).__qualname__
    seen = seen | {id(value)}
    if isinstance(value, list | tuple):
        return [type(value).__name__, *(_facts(item, seen) for item in value)]
    if isinstance(value, set | frozenset):
        return [type(value).__name__, *sorted(repr(_facts(item, seen)) for item in value)]
    if isinstance(value, Mapping):
        return {repr(key): _facts(item, seen) for key, item in value.items()}
    if isinstance(value, functools.partial):
        return ["partial", *(_facts(part, seen) for part in (value.func, value.args, value.keywords))]
    if isinstance(value, types.MethodType):
        return ["method", _facts(value.__func__, seen), _facts(value.__self__, seen)]
    if isinstance(value, types.FunctionType):
        return _function(value, seen)
    if inspect.isclass(value) or inspect.isbuiltin(value) or inspect.ismodule(value):
        return [type(value).__name__, getattr(value, "__qualname__", value.__name__)]
    return _object(value, seen)


def _function(function: types.FunctionType, seen: set[int]) -> Any:
    cells = inspect.getclosurevars(function).nonlocals
    return {
        "name": function.__qualname__,
        "code": _source(function) or _compiled(function.__code__),
        "values": [
            _facts(part, seen) for part in (function.__defaults__, function.__kwdefaults__, dict(cells))
        ],
    }


def _object(value: Any, seen: set[int]) -> Any:
    own = type(value)
    if not callable(value) or hasattr(value, "named_parameters"):  # a client, a network: data, not code
        return own.__qualname__
    call = inspect.getattr_static(own, "__call__", None)
    code = None
    if not own.__module__.startswith("palate."):  # Palate's own classes change with its version
        code = _source(own) or (_compiled(call.__code__) if isinstance(call, types.FunctionType) else None)
    attributes = getattr(value, "__dict__", {})
    public = {name: _facts(item, seen) for name, item in attributes.items() if not name.startswith("_")}
    return {"class": own.__qualname__, "code": code, "attributes": public}


def _source(code: Any) -> str | None:
    try:
        return inspect.getsource(code)
    except (OSError, TypeError):  # typed into a plain interpreter, or made by `exec`
        return None


def _compiled(code: types.CodeType) -> Any:
    constants = [
        _compiled(part) if isinstance(part, types.CodeType) else repr(part) for part in code.co_consts
    ]
    return [code.co_code.hex(), constants, code.co_names, code.co_varnames]
