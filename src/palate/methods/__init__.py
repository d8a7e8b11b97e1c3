"""The methods, one file each. A file with a METHOD is a method: adding one takes no other step."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from types import MappingProxyType

from palate.method import Method


def _found() -> dict[str, Method]:
    modules = [importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__)]
    methods = [module.METHOD for module in modules if "METHOD" in vars(module)]
    return {method.name: method for method in sorted(methods, key=lambda m: m.name)}


METHODS: Mapping[str, Method] = MappingProxyType(_found())
"""Every method by its name on the command line."""

__all__ = ["METHODS", "Method"]
