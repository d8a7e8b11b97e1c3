"""The methods, one file each: adding a file adds a method.

`METHODS` lists the files and imports a method on first access, so the command line imports only the method
that it runs.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator, Mapping

from palate.method import Method

__all__ = ["METHODS", "Method"]


class _Methods(Mapping[str, Method]):
    """A mapping of each method's name on the command line (its file's name with dashes) to the method."""

    def __init__(self) -> None:
        files = (info.name for info in pkgutil.iter_modules(__path__))
        self._modules = {name.replace("_", "-"): f"{__name__}.{name}" for name in sorted(files)}

    def __getitem__(self, name: str) -> Method:
        method = importlib.import_module(self._modules[name]).METHOD
        assert isinstance(method, Method), f"METHOD of {name}"
        return method

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def __contains__(self, name: object) -> bool:
        return name in self._modules


METHODS: Mapping[str, Method] = _Methods()
"""Every method by its name on the command line."""
