"""Build a configuration from a YAML file and flags; each mistake becomes one sentence of a `ConfigError`.

Values have four layers: a flag overrides a key of the file, which overrides `base`, which overrides the
class's default. Layers are not merged within a field, lists and mappings included. pydantic validates the
values; this module rewrites its errors to name the flag, or the key with file and line.
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

from palate.beside import beside
from palate.config import Config, judge_block
from palate.errors import ConfigError
from palate.near import near, setting_near

C = TypeVar("C", bound=Config)

MOST_MISTAKES = 3
"""Most mistakes named in one message; the others are counted."""

_WORDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
}
_BOUNDS = {"greater_than", "greater_than_equal", "less_than", "less_than_equal", "finite_number"}
_OF_THE_TYPE = _BOUNDS | {"literal_error", "int_from_float"}
"""pydantic's error types that the expected type explains, besides `..._type` and `..._parsing`."""


@dataclass(frozen=True)
class _Given:
    """A given value, its label in messages, and its place in the file if it comes from one."""

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
    """Return a `cls` built from `flags`, the YAML `file`, `base` and the defaults of `cls`, in this priority.

    Args:
        cls: the configuration class.
        file: YAML with fields by name; dashes in keys count as underscores. Paths of what is read are
            relative to the file, as `palate.beside` says.
        flags: values by field name, as text or already converted.
        base: values that replace defaults of `cls`.
        choose: for a method with several variants whose fields `cls` combines: returns the class for the
            given values (`palate.method.Method.choose`). Fields of the other variants are left out.
        python: `flags` are keyword arguments of a Python call, and messages name them as such.

    Raises:
        ConfigError: the file or a value is invalid; the message names up to three mistakes.
    """
    assert cls.model_fields.keys() >= {*flags, *(base or {})}, "names in flags and base come from Palate"
    given = {name: _Given(value, name) for name, value in (base or {}).items()}
    file = None if file is None else file.expanduser()
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


def read_values(cls: type[Config], file: Path) -> dict[str, Any]:
    """Return the values of a YAML file by field name, not yet converted.

    Raises:
        ConfigError: the file cannot be read, or has a key that is not a field.
    """
    entries, mistakes = _from_file(cls, file.expanduser())
    if mistakes:
        raise ConfigError("; ".join(mistakes[:MOST_MISTAKES]))
    return {name: entry.value for name, entry in entries.items()}


def offered(cls: type[Config]) -> list[str]:
    """Return the fields that flags and files may set: all except those in `cls.unoffered`."""
    unoffered = getattr(cls, "unoffered", ())
    return [name for name in cls.model_fields if name not in unoffered]


def flag_name(field: str) -> str:
    """Return the flag of a field: `--max-new-tokens` for `max_new_tokens`."""
    return "--" + field.replace("_", "-")


def plain(hint: Any) -> Any:
    """Return the bare type: `int` for `int | None` and for `Annotated[int, ...]`."""
    if get_origin(hint) is Annotated:
        return plain(get_args(hint)[0])
    options = [option for option in get_args(hint) if option is not types.NoneType] if is_union(hint) else []
    return plain(options[0]) if len(options) == 1 else hint


def is_union(hint: Any) -> bool:
    """Return True for a union type, in either spelling."""
    return get_origin(hint) in (Union, types.UnionType)


# The file


class _Loader(yaml.SafeLoader):
    """A loader like `yaml.safe_load`, except that a duplicate key is an error; PyYAML keeps the last one."""

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
    """Return the file's values by field name, and the mistakes in its keys."""
    entries: dict[str, _Given] = {}
    mistakes = []
    folder = file.parent
    for key, (value, line) in _read_yaml(file).items():
        name = key.replace("-", "_")
        place = f" (line {line} of {file})"
        if name not in offered(cls):
            meant = setting_near(name, offered(cls))
            advice = f"did you mean `{meant}`?" if meant else "--help lists the options"
            mistakes.append(f"unknown key `{key}`{place}, {advice}")
        elif name == "judge" and isinstance(value, Mapping):
            try:
                block = judge_block(value)
            except ValueError as error:
                mistakes.append(f"{error}{place}")
                continue
            for part, own in block.items():
                entries[part] = _Given(beside(part, own, folder), f"judge.{_short(part)}", place)
        elif name in entries:
            mistakes.append(f"`{key}`{place} is already given{entries[name].place}, keep one")
        else:
            entries[name] = _Given(beside(name, value, folder), name, place)
    return entries, mistakes


def _short(field: str) -> str:
    """Return the name of a judge's field within its block."""
    return "model" if field == "judge" else field.removeprefix("judge_")


def _read_yaml(file: Path) -> dict[str, tuple[Any, int]]:
    """Return each top-level key as written, with its value and line."""
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
        raise ConfigError(
            f"config file {file} contains {kind}, expected lines of `key: value`, such as `beta: 0.1`"
        )
    # By the key as written: YAML 1.1 reads `on` as true, and the message should say `on`.
    return {
        key.value: (data[loader.construct_object(key)], key.start_mark.line + 1)
        for key, _ in node.value
        if isinstance(key, yaml.ScalarNode)
    }


def _explain(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and (mark := error.problem_mark) is not None:
        problem = error.problem or "it cannot be parsed"
        if error.context and problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        return f" at line {mark.line + 1}, column {mark.column + 1}: {problem}"
    return f": {_flat(str(error))}"


# pydantic's errors in words


def _unmixed(cls: type[Config], name: str, value: Any) -> Any:
    """Return a value for pydantic, without the mix-ups that it would accept or explain badly.

    A bool given for a number becomes text, so that it is refused; pydantic would read true as 1. The word
    `None`, which YAML and the shell read as text, is None where that is the default.
    """
    if value == "None" and cls.model_fields[name].default is None:
        return None
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
    """Return one sentence per invalid value, for which pydantic may report several errors."""
    sentences: dict[tuple[int | str, ...], str] = {}
    for detail in error.errors():
        if not detail["loc"]:  # the error of a model validator
            sentences.setdefault((), _reason(detail))
            continue
        name = str(detail["loc"][0])
        if name not in given:
            source = file or ("a configuration file" if python else "a --config file")
            setting = f"{name}=" if python else flag_name(name)
            sentences[(name,)] = f"{name} is missing, give {setting} or the key `{name}` in {source}"
            continue
        field = cls.model_fields[name]
        place = detail["loc"][: 2 if _is_container(field.annotation) else 1]
        sentences.setdefault(place, _sentence(field, given[name], place[1:], detail))
    return list(sentences.values())


def _sentence(field: FieldInfo, given: _Given, item: tuple[int | str, ...], detail: ErrorDetails) -> str:
    """Return a sentence with the value and what was expected.

    `item` is the index or key of the invalid entry if the value is a list or a mapping.
    """
    kind, hint, bounds = detail["type"], field.annotation, field.metadata
    label = given.label + "".join(f".{part}" if isinstance(part, str) else f"[{part}]" for part in item)
    value = given.value
    if item:
        # The type of the values is a mapping's last argument, and that of items is a list's or tuple's first.
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
    """Return a description of the values that a field of type `hint` takes: "a number greater than 0"."""
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
        return f"{expected(arguments[0])} or a list of such values"
    if origin is not None and issubclass(origin, Mapping):
        return "names with values, such as `prompt: instruction`"
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
    """Return a value as a person would write it, truncated to 60 characters."""
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
