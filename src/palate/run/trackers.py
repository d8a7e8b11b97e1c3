"""Experiment trackers, through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.errors import ConfigError

KNOWN = ("tensorboard", "wandb", "trackio")


def check_trackers(names: Sequence[str]) -> None:
    """Raise ConfigError if a tracker is unknown or not installed."""
    for name in names:
        if name not in KNOWN:
            raise ConfigError(f"report_to {name!r} is unknown; expected one of {', '.join(KNOWN)}")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"report_to {name!r} needs a package: run `pip install {name}`")


class Trackers:
    """Sends metrics to the chosen trackers; without any, does nothing and imports nothing.

    Raises:
        ConfigError: a tracker is unknown or not installed.
    """

    def __init__(self, names: Sequence[str], directory: Path, config: Mapping[str, Any]) -> None:
        self._accelerator: Any = None
        check_trackers(names)
        if names:
            from accelerate import Accelerator

            self._accelerator = Accelerator(log_with=list(names), project_dir=str(directory))
            plain = {k: v if isinstance(v, int | float | str | bool) else str(v) for k, v in config.items()}
            self._accelerator.init_trackers("palate", config=plain)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Send the metrics of one step."""
        if self._accelerator is not None:
            self._accelerator.log(dict(metrics), step=step)

    def close(self) -> None:
        """Send pending metrics and close the trackers."""
        if self._accelerator is not None:
            self._accelerator.end_training()
