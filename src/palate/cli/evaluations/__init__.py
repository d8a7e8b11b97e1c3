"""The commands of `palate evaluate`, one file each. To add one, add a file that defines COMMAND.

As in `palate.cli.commands`, a file imports slow libraries only inside the function that needs them.
"""

from __future__ import annotations

from collections.abc import Mapping

from palate.cli.command import Command
from palate.declared import Declared

MEMBERS: Mapping[str, Command] = Declared(__name__, __path__, "COMMAND")
"""All evaluations by name."""

__all__ = ["MEMBERS"]
