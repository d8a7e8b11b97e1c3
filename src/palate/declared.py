"""Discovery of methods and commands: each file of a package declares one object."""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class Declared(Mapping[str, T], Generic[T]):
    """The declared objects by file name, with dashes for underscores, sorted by name.

    Listing the names imports nothing. A file is imported when its object is accessed.

    Args:
        package: the package's `__name__`.
        path: the package's `__path__`.
        variable: the name of the variable that each file declares, such as `METHOD`.
    """

    def __init__(self, package: str, path: Any, variable: str) -> None:
        self._package, self._variable = package, variable
        modules = (info.name for info in pkgutil.iter_modules(path))
        self._modules = {name.replace("_", "-"): name for name in sorted(modules)}

    def __getitem__(self, name: str) -> T:
        """Import the file and return its declared object."""
        module = import_module(f"{self._package}.{self._modules[name]}")
        return cast("T", getattr(module, self._variable))

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._modules)

    def __len__(self) -> int:
        """Return the number of files."""
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        """Return whether a file has this name, without importing it."""
        return name in self._modules
