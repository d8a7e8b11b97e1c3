"""Declarations in the files of a package, one per file: the lists of methods and commands."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Declared(Mapping[str, T], Generic[T]):
    """Declarations by the names of their files, with dashes for underscores, in order of names.

    Listing the names imports no file; a file is imported on the first access to its declaration.

    Args:
        package: the package's `__name__`.
        path: the package's `__path__`.
        variable: name of the variable in each file, such as `METHOD`.
    """

    def __init__(self, package: str, path: Any, variable: str) -> None:
        self._package, self._variable = package, variable
        files = (info.name for info in pkgutil.iter_modules(path))
        self._modules = {name.replace("_", "-"): name for name in sorted(files)}

    def __getitem__(self, name: str) -> T:
        """Import the file, and return its declaration."""
        module = import_module(f"{self._package}.{self._modules[name]}")
        return cast("T", getattr(module, self._variable))

    def __iter__(self) -> Iterator[str]:
        """Return an iterator over the names."""
        return iter(self._modules)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        """Return whether a file has this name, without importing it."""
        return name in self._modules
