"""The methods, one file each: adding a file adds a method.

`METHODS` lists the files and imports a method on first access, so the command line imports only the method
that it runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from palate.declared import Declared
from palate.method import Method

METHODS: Mapping[str, Method] = Declared(__name__, __path__, "METHOD")
"""All methods by their names on the command line, which are their files' names with dashes."""

__all__ = ["METHODS", "Method"]
