"""The commands, one file each. A file with a COMMAND is a command: adding one takes no other step.

Such a file is imported for the list of commands in `palate --help` as well. So it imports torch, and what
brings torch, within the function that needs it.
"""

from __future__ import annotations

from palate.cli.command import Commands
from palate.declared import Declared

COMMANDS: Commands = Declared(__name__, __path__, "COMMAND")
"""Every command by its name."""

__all__ = ["COMMANDS"]
