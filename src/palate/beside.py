"""Paths in a configuration file, which are relative to the file."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FIELDS = frozenset(
    {"data", "eval_data", "probe_data", "model", "base", "chat_template", "judge_template", "pool"}
    | {"reward", "eval_reward", "judge", "judge_panel", "judge_expert"}
)
"""The fields with the path of something that is read. Others are relative to the working directory."""

BUILT_IN = frozenset({"everyday", "smollm2"})
"""Names of data and models that come with Palate; a file of this name does not hide them."""

_SPEC = re.compile(
    r"(?P<weight>(?:[-+\d.eE]+\s*\*\s*)?)(?:(?P<kind>model:|ranker:|local:)(?P<model>.+)"
    r"|(?P<file>.+\.py)(?P<function>:\w*))"
)
"""A reward or a judge that names a directory or a file."""


def beside(field: str, value: Any, folder: Path) -> Any:
    """Return a value of a configuration file with its path relative to the working directory.

    A relative path that exists in `folder` is taken from there. All else stays as it is: other paths, hub
    ids, names of what comes with Palate, and values that are no paths.

    Args:
        field: name of the field.
        value: its value in the file; of a list, each item is treated in this way.
        folder: the directory of the file.
    """
    if isinstance(value, list):
        return [beside(field, item, folder) for item in value]
    if field not in FIELDS or not isinstance(value, str) or not value:
        return value
    if not field.startswith(("reward", "eval_reward", "judge")) or field == "judge_template":
        return _found(value, folder)
    match = _SPEC.fullmatch(value)
    if match is None:
        return value
    if match["kind"]:
        return f"{match['weight']}{match['kind']}{_found(match['model'], folder)}"
    return f"{match['weight']}{_found(match['file'], folder)}{match['function']}"


def _found(path: str, folder: Path) -> str:
    """Return the path in `folder` if something is there; a text behind a colon may name a part of it."""
    if path in BUILT_IN or Path(path).is_absolute() or path.startswith("~"):
        return path
    there = any((folder / name).exists() for name in (path, path.rpartition(":")[0]) if name)
    return str(folder / path) if there else path
