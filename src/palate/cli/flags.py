"""Flags built from a configuration class: one per field, with the field's docstring as help.

Flag values are passed on as text, and `load_config` lets pydantic convert them. So a bad value gives the same
message from a flag and from a file, and a missing flag differs from a flag set to its default: the file may
replace only the former.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

from cyclopts import Group, Parameter

from palate.cli.descriptions import description
from palate.config import Config, MethodConfig
from palate.errors import ConfigError
from palate.settings import flag_name, is_union, load_config, offered, plain

C = TypeVar("C", bound=Config)
R = TypeVar("R")

_METAVARS: dict[Any, str] = {int: "INT", float: "FLOAT", Path: "PATH"}

_ALIAS = "__alias"
"""The end of the name of a parameter for the second spelling of a field's flag."""


def command(
    cls: type[C],
    run: Callable[[C], R],
    *,
    name: str,
    help: str,
    base: Mapping[str, Any] | None = None,
    first: str | None = None,
    choose: Callable[[Mapping[str, Any]], type[C]] | None = None,
) -> Callable[..., R]:
    """Return a function for `cyclopts.App.command` that builds a `cls` from flags and calls `run` with it.

    Args:
        cls: the configuration class; its fields become flags, and `--config FILE` is added.
        run: does the command's work.
        name: the command's name.
        help: one line about the command.
        base: values that replace defaults of `cls`, also in the help.
        first: the field whose value is the command's first word instead of a flag; it is required.
        choose: as in `load_config`.
    """
    assert "config" not in cls.model_fields, "the flag --config names the file"

    def action(*words: str, config: str | None = None, **given: Any) -> R:
        if first is not None:
            if not words:
                raise ConfigError(f"{first} is missing; write `palate {name} {first.upper()}`")
            given[first] = words[0]
        fields = {field.partition(_ALIAS)[0]: value for field, value in given.items()}
        flags = {field: _value(cls, field, value) for field, value in fields.items()}
        file = Path(config) if config is not None else None
        return run(load_config(cls, file=file, flags=flags, base=base, choose=choose))

    parameters = [*_first(cls, first), *_parameters(cls, base or {})]
    vars(action)["__signature__"] = inspect.Signature(parameters)
    action.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    action.__name__, action.__doc__ = name.replace("-", "_"), help
    return action


def panels(cls: type[Config]) -> dict[str, list[str]]:
    """Return field names by the title of their panel in the help, the class's own panel first.

    A part is a direct subclass of `Config`. The first line of its docstring is the title of its fields, also
    if a method redeclares a field to change its default.
    """
    own = "Method" if issubclass(cls, MethodConfig) else "Options"
    owners: dict[str, type] = {}
    declared = {part: inspect.get_annotations(part) for part in cls.__mro__ if issubclass(part, Config)}
    for part, names in declared.items():
        owners |= {name: part for name in names if name in offered(cls)}
    titled: dict[str, list[str]] = {own: []}
    for part, names in declared.items():
        is_part = part is not cls and Config in part.__bases__
        title = (part.__doc__ or part.__name__).strip().splitlines()[0] if is_part else own
        titled.setdefault(title, []).extend(name for name in names if owners.get(name) is part)
    return {title: names for title, names in titled.items() if names or title == own}


def _first(cls: type[Config], field: str | None) -> Iterator[inspect.Parameter]:
    if field is not None:
        about = Parameter(help=description(cls, field), metavar=field.upper(), show_default=False)
        only = inspect.Parameter.POSITIONAL_ONLY
        yield inspect.Parameter(field, only, default="", annotation=Annotated[str, about])


def _parameters(cls: type[Config], base: Mapping[str, Any]) -> Iterator[inspect.Parameter]:
    for order, (title, names) in enumerate(panels(cls).items()):
        group = Group(title, sort_key=order)
        if order == 0:
            text = (
                "YAML file with any of these options by name. Flags override it. Relative paths of data, "
                "models, templates and rewards are relative to the file, or to the working directory if only "
                "that has them; --output is relative to the working directory."
            )
            yield _parameter(
                "config",
                str,
                Parameter(name="--config", metavar="FILE", help=text, show_default=False, group=group),
            )
        for name in names:
            yield _field_parameter(cls, name, base, group)
            if name in getattr(cls, "flags", {}):
                yield _alias(name)


def _field_parameter(
    cls: type[Config], name: str, base: Mapping[str, Any], group: Group
) -> inspect.Parameter:
    field = cls.model_fields[name]
    hint = plain(field.annotation)
    many = _is_many(hint)
    required = field.is_required() and name not in base
    notes = ["Repeatable."] * many + ["[required]"] * required
    text = description(cls, name)
    default = base.get(name, None if field.is_required() else field.get_default(call_default_factory=True))
    renamed = getattr(cls, "flags", {}).get(name)
    # A default that depends on other options is in the text, and would be shown twice.
    stated = renamed is not None or (name not in base and "efault: " in text)
    parameter = Parameter(
        name=renamed or flag_name(name),
        negative=_negative(name) if hint is bool and renamed is None else (),
        help=" ".join([*text.split(), *notes]),
        metavar=None if hint is bool else metavar(hint),
        show_default=False if stated else _default(name, default) or False,
        json_list=False,
        group=group,
    )
    return _parameter(name, bool if hint is bool else list[str] if many else str, parameter)


def _alias(name: str) -> inspect.Parameter:
    """Return a switch with the field's own name: it works beside the renamed flag, and the help hides it."""
    parameter = Parameter(name=flag_name(name), negative=_negative(name), show=False)
    return _parameter(f"{name}{_ALIAS}", bool, parameter)


def _parameter(name: str, hint: Any, parameter: Parameter) -> inspect.Parameter:
    # The default only makes the flag optional. It is never passed: cyclopts calls a command with the given
    # values only. It has the hint's type because cyclopts checks the type if pydantic is loaded.
    keyword_only = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, keyword_only, default=hint(), annotation=Annotated[hint, parameter])


def _negative(name: str) -> str:
    return flag_name(f"no_{name}")


def metavar(hint: Any) -> str:
    """Return the placeholder for a value of type `hint` in the help: `FLOAT`, `auto|float32`, `KEY=VALUE`."""
    hint = plain(hint)
    if get_origin(hint) is Literal:
        return "|".join(str(choice) for choice in get_args(hint))
    if is_union(hint):
        return "|".join(metavar(option) for option in get_args(hint) if option is not type(None))
    if _is_mapping(hint):
        return "KEY=VALUE"
    return metavar(get_args(hint)[0]) if _is_many(hint) else _METAVARS.get(hint, "TEXT")


def _is_mapping(hint: Any) -> bool:
    origin = get_origin(hint)
    return isinstance(origin, type) and issubclass(origin, Mapping)


def _is_many(hint: Any) -> bool:
    return get_origin(hint) in (tuple, list) or _is_mapping(hint)


def _default(name: str, value: Any) -> str:
    """Return a default value as a user would type it after the flag; empty if there is nothing to show."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return flag_name(name) if value else _negative(name)
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, tuple | list):
        return ", ".join(_default(name, item) for item in value)
    return str(value).removesuffix(".0") if isinstance(value, float) else str(value)


def _value(cls: type[Config], name: str, given: Any) -> Any:
    """Return a flag's text in a form that pydantic can convert."""
    hint = plain(cls.model_fields[name].annotation)
    if _is_mapping(hint):
        return _pairs(name, given)
    if get_origin(hint) is Literal:
        return {str(choice): choice for choice in get_args(hint)}.get(given, given)
    return given


def _pairs(name: str, texts: list[str]) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for text in texts:
        if text.startswith("{"):  # all of them as one JSON object
            try:
                pairs |= json.loads(text)
                continue
            except ValueError as error:
                raise ConfigError(
                    f"{flag_name(name)} is {text!r}, which is not valid JSON ({error})"
                ) from error
        key, equals, value = text.partition("=")
        if not (key and equals and value):
            raise ConfigError(
                f"{flag_name(name)} is {text!r}, expected KEY=VALUE, such as prompt=instruction"
            )
        if key in pairs:
            raise ConfigError(f"{flag_name(name)} sets {key} twice, to {pairs[key]} and {value}; keep one")
        pairs[key] = value
    return pairs
