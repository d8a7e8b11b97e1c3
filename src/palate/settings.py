"""Configuration from a YAML file and flags; every mistake ends as one sentence of a `ConfigError`.

What is given stands in layers: a flag over a key of the file over `base` over the class's default. A field
is taken whole from the highest layer that has it, lists and mappings too. pydantic decides what is valid;
its errors are told again here in words that name the flag, or the key with file and line.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from palate.config import Config, judge_block
from palate.errors import ConfigError
from palate.near import near

C = TypeVar("C", bound=Config)

MOST_MISTAKES = 3
"""A message tells of so many mistakes at once."""

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_OF_THE_TYPE = _BOUNDS | {"literal_error", "int_from_float"}
"""Errors of pydantic that the field's type explains, besides those named `..._type` and `..._parsing`."""


@dataclass(frozen=True)
class _Given:
    """A value, what a message calls it, and where it stands if that needs saying."""

    value: Any
    label: str
    place: str = ""


def load_config(
    cls: type[C],
    *,
    file: Path | None,
    flags: Mapping[str, Any],
    base: Mapping[str, Any] | None = None,
    choose: Callable[[Mapping[str, Any]], type[C]] | None = None,
    python: bool = False,
) -> C:
    """A `cls` from `flags` over the YAML `file` over `base` over the defaults of `cls`.

    Args:
        cls: the configuration class.
        file: YAML with fields by name; dashes in keys count as underscores.
        flags: values by field name, as text or already converted.
        base: values that stand in for defaults of `cls`.
        choose: of a method with several ways, whose fields `cls` has together: gives the class that the
            values are for (`palate.method.Method.choose`). Fields of the others are left out.
        python: `flags` are keyword arguments of a Python call, and messages name them as such.

    Raises:
        ConfigError: naming up to three mistakes.
    """
    assert cls.model_fields.keys() >= {*flags, *(base or {})}, "flags and base are named by our own code"
    given = {name: _Given(value, name) for name, value in (base or {}).items()}
    entries, mistakes = _from_file(cls, file) if file is not None else ({}, [])
    label = str if python else flag_name
    given |= entries | {name: _Given(value, label(name)) for name, value in flags.items()}
    values = {name: _unmixed(cls, name, entry.value) for name, entry in given.items()}
    try:
        chosen = cls if choose is None else choose(values)
        config = chosen.model_validate({k: value for k, value in values.items() if k in chosen.model_fields})
    except ValidationError as error:
        mistakes += _mistakes(cls, error, given, file, python=python)
    except ConfigError as error:
        mistakes.append(str(error))
    if mistakes:
        more = len(mistakes) - MOST_MISTAKES
        raise ConfigError("; ".join(mistakes[:MOST_MISTAKES]) + (f"; and {more} more" if more > 0 else ""))
    return config


def offered(cls: type[Config]) -> list[str]:
    """Fields that flags and files may give: all but those that `cls.unoffered` names."""
    unoffered = getattr(cls, "unoffered", ())
    return [name for name in cls.model_fields if name not in unoffered]


def flag_name(field: str) -> str:
    """`--max-new-tokens` of `max_new_tokens`."""
    return "--" + field.replace("_", "-")


def plain(hint: Any) -> Any:
    """The bare type: `int` of `int | None` and of `Annotated[int, ...]`."""
    if get_origin(hint) is Annotated:
        return plain(get_args(hint)[0])
    options = [option for option in get_args(hint) if option is not types.NoneType] if is_union(hint) else []
    return plain(options[0]) if len(options) == 1 else hint


def is_union(hint: Any) -> bool:
    """Whether the type is a union, in either spelling."""
    return get_origin(hint) in (Union, types.UnionType)


# The file


class _Loader(yaml.SafeLoader):
    """YAML as `yaml.safe_load` reads it, but a key that appears twice is an error: PyYAML keeps the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[tuple[str, str], yaml.Node] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag.endswith(":merge"):
                continue
            first = seen.setdefault((key.tag, key.value), key)
            if first is not key:
                line = first.start_mark.line + 1
                problem = f"the key `{key.value}` appears twice, first on line {line}, keep one"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
        return super().construct_mapping(node, deep)


def _from_file(cls: type[Config], file: Path) -> tuple[dict[str, _Given], list[str]]:
    """Values by field name, and what is wrong with the keys."""
    entries: dict[str, _Given] = {}
    mistakes = []
    for key, (value, line) in _read_yaml(file).items():
        name = key.replace("-", "_")
        place = f" (line {line} of {file})"
        if name not in offered(cls):
            meant = near(name, offered(cls))
            advice = f"did you mean `{meant}`?" if meant else "--help lists what there is"
            mistakes.append(f"unknown key `{key}`{place}, {advice}")
        elif name == "judge" and isinstance(value, Mapping):
            try:
                block = judge_block(value)
            except ValueError as error:
                mistakes.append(f"{error}{place}")
                continue
            entries |= {part: _Given(own, f"judge.{_short(part)}", place) for part, own in block.items()}
        elif name in entries:
            mistakes.append(f"`{key}`{place} is given already{entries[name].place}, keep one")
        else:
            entries[name] = _Given(value, name, place)
    return entries, mistakes


def _short(field: str) -> str:
    """The name of a judge's field within its block."""
    return "model" if field == "judge" else field.removeprefix("judge_")


def _read_yaml(file: Path) -> dict[str, tuple[Any, int]]:
    """Each top-level key as written, with its value and line."""
    try:
        loader = _Loader(file.read_text(encoding="utf-8-sig"))
        node = loader.get_single_node()
        data = loader.construct_document(node) if node is not None else {}
    except FileNotFoundError:
        raise ConfigError(f"config file {file} does not exist, expected the path of a YAML file") from None
    except OSError as error:
        raise ConfigError(f"config file {file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"config file {file} is not UTF-8 text: byte {error.start} cannot be read"
        ) from None
    except yaml.YAMLError as error:
        raise ConfigError(f"config file {file} is not valid YAML{_explain(error)}") from None
    if node is None:
        return {}
    if not isinstance(node, yaml.MappingNode):
        kind = "a list" if isinstance(node, yaml.SequenceNode) else f"just {_show(data)}"
        raise ConfigError(f"config file {file} holds {kind}, expected lines of `key: value`, as `beta: 0.1`")
    # By the key as written: YAML 1.1 reads `on` as true, and the message should say `on`.
    return {
        key.value: (data[loader.construct_object(key)], key.start_mark.line + 1)
        for key, _ in node.value
        if isinstance(key, yaml.ScalarNode)
    }


def _explain(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        what = error.problem or "it cannot be parsed"
        what = f"{error.context}, {what}" if error.context and what.startswith("but ") else what
        return f" at line {mark.line + 1}, column {mark.column + 1}: {what}"
    return f": {_flat(str(error))}"


# What pydantic found, in words


def _unmixed(cls: type[Config], name: str, value: Any) -> Any:
    """`value` for pydantic, which would take true for the number 1: as text, it refuses it."""
    number = plain(cls.model_fields[name].annotation) in (int, float)
    return str(value) if number and isinstance(value, bool) else value


def _mistakes(
    cls: type[Config],
    error: ValidationError,
    given: Mapping[str, _Given],
    file: Path | None,
    *,
    python: bool,
) -> list[str]:
    """One sentence for each value at fault, of which pydantic may tell several things."""
    found: dict[tuple[int | str, ...], str] = {}
    for detail in error.errors():
        if not detail["loc"]:  # a model validator's
            found.setdefault((), _reason(detail))
            continue
        name = str(detail["loc"][0])
        if name not in given:
            source = file or ("a configuration file" if python else "a --config file")
            setting = f"{name}=" if python else flag_name(name)
            found[(name,)] = f"{name} is missing, give {setting} or the key `{name}` in {source}"
            continue
        field = cls.model_fields[name]
        place = detail["loc"][: 2 if _is_container(field.annotation) else 1]
        found.setdefault(place, _sentence(field, given[name], place[1:], detail))
    return list(found.values())


def _sentence(field: FieldInfo, given: _Given, item: tuple[int | str, ...], detail: ErrorDetails) -> str:
    """What a value is and what was expected; `item` is the index or key of the one at fault among several."""
    kind, hint, bounds = detail["type"], field.annotation, field.metadata
    label = given.label + "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in item)
    value = given.value
    if item:
        # A mapping has its values' type last, a list or tuple that of its items first.
        hint, bounds = get_args(plain(hint))[-1 if isinstance(item[0], str) else 0], []
        value = detail["input"]
    if "error" in detail.get("ctx", {}):
        return f"{label}: {_reason(detail)}{given.place}"
    if kind not in _OF_THE_TYPE and not kind.endswith(("_type", "_parsing")):
        return f"{label} is {_show(value)}: {_reason(detail)}{given.place}"
    want = "a finite number" if kind == "finite_number" else expected(hint, bounds)
    return f"{label} is {_show(value)}, expected {want}{given.place}{_advice(kind, hint, value, given)}"


def _advice(kind: str, hint: Any, value: Any, given: _Given) -> str:
    if kind == "literal_error" and isinstance(value, str):
        meant = near(value, [str(choice) for choice in get_args(plain(hint))])
        return f", did you mean {meant}?" if meant else ""
    unquoted = value is not None and not isinstance(value, str | list | dict)
    return ", put it in quotes" if given.place and kind in ("string_type", "path_type") and unquoted else ""


def _is_container(hint: Any) -> bool:
    return not is_union(plain(hint)) and get_origin(plain(hint)) not in (None, Literal)


def _reason(detail: ErrorDetails) -> str:
    cause = detail.get("ctx", {}).get("error")
    if cause is not None:
        return _flat(str(cause))
    text = _flat(detail["msg"])
    return text[:1].lower() + text[1:]


def expected(hint: Any, bounds: Iterable[Any] = ()) -> str:
    """What a field of type `hint` takes, in words: "a number greater than 0"."""
    if get_origin(hint) is Annotated:
        inner, *notes = get_args(hint)
        bounds = [*bounds, *chain(*(n.metadata if isinstance(n, FieldInfo) else [n] for n in notes))]
        return expected(inner, bounds)
    origin, arguments = get_origin(hint), get_args(hint)
    if is_union(hint):
        return " or ".join(expected(option, bounds) for option in arguments if option is not types.NoneType)
    if origin is Literal:
        choices = ", ".join(str(choice) for choice in arguments)
        return f"one of {choices}" if len(arguments) > 1 else choices
    if origin in (tuple, list):
        return f"{expected(arguments[0])} or a list of that"
    if origin is not None and issubclass(origin, Mapping):
        return "names with values, as `prompt: instruction`"
    if hint in (int, float):
        return _WORDS[hint] + _limits(bounds)
    return _WORDS.get(hint, getattr(hint, "__name__", str(hint)))


def _limits(bounds: Iterable[Any]) -> str:
    parts = []
    for bound in bounds:
        match bound:
            case annotated_types.Gt(gt=limit):
                parts.append(f"greater than {limit}")
            case annotated_types.Ge(ge=limit):
                parts.append(f"at least {limit}")
            case annotated_types.Lt(lt=limit):
                parts.append(f"less than {limit}")
            case annotated_types.Le(le=limit):
                parts.append(f"at most {limit}")
    text = " and ".join(parts)
    return f" of {text}" if text.startswith("at ") else f" {text}".rstrip()


def _show(value: Any) -> str:
    """A value as a person would write it, cut at 60 characters."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str | list | dict | tuple) and not _numeric(value) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _numeric(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return False
    return True


def _flat(text: str) -> str:
    return " ".join(text.split())
