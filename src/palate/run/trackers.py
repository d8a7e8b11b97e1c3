"""Experiment trackers, through accelerate."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from palate.errors import ConfigError

PROJECT = "palate"
"""The project of all runs in the trackers; TensorBoard has it as a directory."""

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

    A run that resumes continues its run in each tracker: in TensorBoard by the directory, in Weights & Biases
    by the id, in Trackio by the name.

    Args:
        names: the trackers.
        directory: for the files of TensorBoard.
        config: settings of the run, which the trackers show.
        id: the run's id.
        name: a name that people see. Those of two runs may be equal, so a part of the id follows it.

    Raises:
        ConfigError: a tracker is unknown or not installed.
    """

    def __init__(
        self, names: Sequence[str], directory: Path, config: Mapping[str, Any], *, id: str, name: str
    ) -> None:
        check_trackers(names)
        self._names = list(names)
        self._directory = directory
        self._config = {k: v if isinstance(v, int | float | str) else str(v) for k, v in config.items()}
        self._id, self._name = id, f"{name}-{id[:8]}"
        self._accelerator: Any = None

    def start(self, after: int) -> None:
        """Start the trackers, or continue their runs.

        Args:
            after: last step whose metrics the run keeps; 0 for a new run. TensorBoard forgets later steps,
                which the run does again.
        """
        if not self._names:
            return
        from accelerate import Accelerator

        known = (self._directory / PROJECT).is_dir()
        self._accelerator = Accelerator(log_with=self._names, project_dir=str(self._directory))
        options: dict[str, dict[str, Any]] = {
            "tensorboard": {"purge_step": after + 1} if known else {},
            "wandb": {"id": self._id, "name": self._name, "resume": "allow"},
            "trackio": {"name": self._name, "resume": "allow"},
        }
        self._accelerator.init_trackers(PROJECT, init_kwargs=options)
        for tracker in self._accelerator.trackers:
            if not (tracker.name == "tensorboard" and known):  # there, a second time makes a second run
                tracker.store_init_configuration(self._config)

    def log(self, metrics: Mapping[str, float], *, step: int) -> None:
        """Send the metrics of one step."""
        if self._accelerator is not None:
            self._accelerator.log(dict(metrics), step=step)

    def close(self) -> None:
        """Send pending metrics and close the trackers."""
        if self._accelerator is not None:
            for tracker in self._accelerator.trackers:  # `end_training` would also end torch's process group
                tracker.finish()
