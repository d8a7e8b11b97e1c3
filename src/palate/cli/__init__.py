"""The command line: `palate run METHOD`, `palate sample`, `palate methods`."""

from palate.cli.app import main

__all__ = ["main"]
