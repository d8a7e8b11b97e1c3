"""The command line: `palate run METHOD`, `palate report`, `palate chat` and the like."""

import os

# When pydantic is imported, it looks for plugins in every installed package; Palate uses none.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")

from palate.cli.app import main

__all__ = ["main"]
