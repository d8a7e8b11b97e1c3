"""Data sets that the library `datasets` reads: saved data sets, folders of files, and the hub."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from palate.data.row import Row, first_line
from palate.errors import DataError

_LISTED = re.compile(r"(?:Should be one of|[Aa]vailable(?: configs)?:?)\s*\[?([^\]\n]*)\]?")


def saved_rows(path: Path, source: str, config: str | None, split: str) -> Iterator[Row]:
    """Return the rows of a folder that `datasets` saved, or that has data files, as a clone has.

    Raises:
        DataError: the folder has no data, is damaged, or lacks the configuration or split.
    """
    import datasets

    if not any((path / name).exists() for name in ("state.json", "dataset_dict.json")):
        return _loaded(str(path), source, config, split, "is a folder that `datasets` cannot read")
    try:
        data = datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{source} is a damaged saved data set ({first_line(error)}); save it again."
        ) from error
    if isinstance(data, datasets.Dataset):
        return _numbered(data, source)
    if split not in data:
        raise DataError(f"{source} has no split '{split}'; it has {', '.join(data)}.")
    return _numbered(data[split], f"{source}[{split}]")


def hub_rows(name: str, source: str, config: str | None, split: str, here: str) -> Iterator[Row]:
    """Return the rows of a data set on the hub. `here` describes this disk, for messages.

    Raises:
        DataError: the hub has no such data set, or cannot be reached.
    """
    import datasets

    try:
        return _loaded(name, source, config, split, f"[{split}] cannot be loaded from the hub")
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"The hub has no data set {name}, or it is private (then log in with: hf auth login). {here}"
        ) from error
    except ConnectionError as error:
        raise DataError(
            f"The hub cannot be reached for {name} ({first_line(error)}); go online, or name a file. {here}"
        ) from error


def _loaded(name: str, source: str, config: str | None, split: str, fails: str) -> Iterator[Row]:
    import datasets

    try:
        data = (
            datasets.load_dataset(name, config, split=split)
            if config
            else datasets.load_dataset(name, split=split)
        )
    except (datasets.exceptions.DatasetNotFoundError, ConnectionError):
        raise
    except (OSError, ValueError, RuntimeError, TypeError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{source}{_spaced(fails)}: {first_line(error)} {_advice(error, source, config)}"
        ) from error
    return _numbered(data, f"{source}[{split}]")


def _spaced(text: str) -> str:
    return text if text.startswith("[") else f" {text}"


def _advice(error: Exception, source: str, config: str | None) -> str:
    """Return advice on which configuration or split to name, from the names in the library's message."""
    text = str(error)
    listed = _LISTED.search(text.replace("\n", " "))
    names = [name.strip(" '\"") for name in listed[1].split(",")] if listed else []
    names = [name for name in names if name]
    if "Config name is missing" in text or "BuilderConfig" in text:
        base = source.removesuffix(f":{config}")
        there = ", ".join(f"{base}:{name}" for name in names)
        return f"It has several configurations; name one of them: {there or f'{base}:CONFIGURATION'}."
    if "Unknown split" in text:
        return f"Choose another --split: {', '.join(names)}."
    return "Choose another --split, or download a file of the data set and give its path."


def _numbered(data: Any, name: str) -> Iterator[Row]:
    """Yield rows of a `datasets.Dataset` as plain Python values, whatever format (torch, numpy) it has."""
    plain = data.with_format(None)
    return (Row(columns, f"{name} row {n}", columnar=True) for n, columns in enumerate(plain, 1))
