"""What the files of a package declare, one name in each: how methods and commands are found."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Declared(Mapping[str, T], Generic[T]):
    """Declarations by the names of their files, with dashes for underscores, in order of names.

    Listing the names imports nothing; a file is imported when its declaration is asked for.

    Args:
        package: its `__name__`.
        path: its `__path__`.
        variable: name of the variable that each file declares, such as `METHOD`.
    """

    def __init__(self, package: str, path: Any, variable: str) -> None:
        self._package, self._variable = package, variable
        found = (info.name for info in pkgutil.iter_modules(path))
        self._modules = {name.replace("_", "-"): name for name in sorted(found)}

    def __getitem__(self, name: str) -> T:
        """Import the file, and return what it declares."""
        module = import_module(f"{self._package}.{self._modules[name]}")
        return cast("T", getattr(module, self._variable))

    def __iter__(self) -> Iterator[str]:
        """The names."""
        return iter(self._modules)

    def __len__(self) -> int:
        """The number of files."""
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        """Return True for a name, without importing its file."""
        return name in self._modules
