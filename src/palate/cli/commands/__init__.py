"""The commands, one file each. To add a command, add a file that defines COMMAND; no other step is needed.

`palate --help` imports every file here. So a file imports torch, and modules that import torch, only inside
the function that needs them.
"""

from __future__ import annotations

from palate.cli.command import Commands
from palate.declared import Declared

COMMANDS: Commands = Declared(__name__, __path__, "COMMAND")
"""All commands by name."""

__all__ = ["COMMANDS"]
