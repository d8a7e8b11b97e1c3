"""Runs: directory, metrics, progress."""

from palate.run.display import Display, plain
from palate.run.run import Metrics, Run

__all__ = ["Display", "Metrics", "Run", "plain"]
