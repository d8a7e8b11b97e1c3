"""Records in files that are mapped into memory: lists of numbers or texts of different lengths, side by side.

A shelf is written once, item by item, and then read in any order. Only the parts that are read take memory,
and the system can drop them again. Nothing here is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Self

import numpy as np
from numpy.typing import NDArray

BUFFER = 1 << 20


class ShelfWriter:
    """Writes the lists of a shelf, and its description last: a shelf without one is not finished.

    Args:
        path: the shelf; its files are `path.NAME`, `path.NAME.ends` and `path.json`.
        kinds: the numpy type of each list's values, by the list's name.

    Raises:
        OSError: a file cannot be written; all methods raise it.
    """

    def __init__(self, path: Path, kinds: Mapping[str, str]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path, self._kinds = path, dict(kinds)
        self._ends = dict.fromkeys(kinds, 0)
        described(path).unlink(missing_ok=True)
        self._files: dict[str, tuple[BinaryIO, BinaryIO]] = {}
        for name in kinds:
            values, ends = _files(path, name)
            self._files[name] = values.open("wb", BUFFER), ends.open("wb", BUFFER)

    def add(self, name: str, values: bytes) -> None:
        """Append a list, as the bytes of its values."""
        data, ends = self._files[name]
        data.write(values)
        self._ends[name] += len(values)
        ends.write(self._ends[name].to_bytes(8, "little"))

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Sync all files, then write the description with these facts, which are JSON values."""
        for files in self._files.values():
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        self.close()
        sizes = {name: [f.stat().st_size for f in _files(self._path, name)] for name in self._kinds}
        description = {"kinds": self._kinds, "sizes": sizes, "facts": dict(facts)}
        part = described(self._path).with_suffix(".part")
        part.write_text(json.dumps(description), encoding="utf-8")
        os.replace(part, described(self._path))

    def close(self) -> None:
        """Close the files."""
        for files in self._files.values():
            for file in files:
                file.close()

    def __enter__(self) -> Self:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; without `finish` the shelf stays unfinished."""
        self.close()


class Shelf:
    """The lists of a finished shelf.

    Attributes:
        facts: what `ShelfWriter.finish` got.

    Args:
        path: the shelf.
    """

    def __init__(self, path: Path) -> None:
        description = json.loads(described(path).read_text(encoding="utf-8"))
        self.facts: dict[str, Any] = description["facts"]
        self._values: dict[str, NDArray[Any]] = {}
        self._ends: dict[str, NDArray[np.int64]] = {}
        for name, kind in description["kinds"].items():
            values, ends = _files(path, name)
            self._ends[name] = _mapped(ends, np.dtype("<i8"))
            self._values[name] = _mapped(values, np.dtype(kind))

    def count(self, name: str) -> int:
        """Return the number of lists under a name."""
        return len(self._ends[name])

    def get(self, name: str, index: int) -> NDArray[Any]:
        """Return the values of a list."""
        ends, values = self._ends[name], self._values[name]
        width = values.dtype.itemsize
        begin = int(ends[index - 1]) // width if index else 0
        return values[begin : int(ends[index]) // width]


def opened(path: Path) -> Shelf | None:
    """Return the shelf; None if it is missing, unfinished, or damaged: its files have not their sizes."""
    try:
        description = json.loads(described(path).read_text(encoding="utf-8"))
        for name, sizes in description["sizes"].items():
            # A mapped file that is too short would end the process with a signal.
            if [file.stat().st_size for file in _files(path, name)] != sizes:
                return None
        return Shelf(path)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def described(path: Path) -> Path:
    """Return the path of a shelf's description."""
    return path.with_name(f"{path.name}.json")


def _files(path: Path, name: str) -> tuple[Path, Path]:
    return path.with_name(f"{path.name}.{name}"), path.with_name(f"{path.name}.{name}.ends")


def _mapped(path: Path, kind: np.dtype[Any]) -> NDArray[Any]:
    """Map a file; an empty file cannot be mapped."""
    if path.stat().st_size == 0:
        return np.empty(0, kind)
    return np.memmap(path, kind, "r")
