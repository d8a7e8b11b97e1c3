"""The members of `palate make`, one file each. To add one, add a file that defines COMMAND."""

from __future__ import annotations

from palate.cli.command import Command
from palate.declared import Declared

MEMBERS: Declared[Command] = Declared(__name__, __path__, "COMMAND")
"""All members by name."""
