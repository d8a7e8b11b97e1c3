"""The methods, one file each: adding a file adds a method.

`METHODS` finds the files and imports a method when it is asked for, so that the command line imports the one
method that it runs.
"""

from __future__ import annotations

from collections.abc import Mapping

from palate.declared import Declared
from palate.method import Method

METHODS: Mapping[str, Method] = Declared(__name__, __path__, "METHOD")
"""Every method by its name on the command line, which is its file's name with dashes."""

__all__ = ["METHODS", "Method"]
