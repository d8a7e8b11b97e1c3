"""The command line: `palate run METHOD`, `palate report`, `palate chat` and the like."""

from palate.cli.app import main

__all__ = ["main"]
