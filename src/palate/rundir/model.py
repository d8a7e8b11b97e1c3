"""Resolve a run's directory that is given as a model to the run's last checkpoint."""

from __future__ import annotations

from pathlib import Path

from palate.errors import ModelError, RunError
from palate.rundir.checkpoints import checkpoint
from palate.rundir.config import description_in


def model_in(directory: Path) -> Path:
    """Return the last finished checkpoint if the directory is a run; else return the directory itself.

    Raises:
        ModelError: the run has no checkpoint yet, or its checkpoints cannot be read.
    """
    try:
        description = description_in(directory)
    except RunError:  # config.json is broken; loading the model reports it
        description = None
    if description is None:
        return directory
    try:
        return checkpoint(directory)
    except RunError as error:
        raise ModelError(str(error)) from None
