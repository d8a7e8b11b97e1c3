"""A run's directory as the name of a model, which means the run's last checkpoint."""

from __future__ import annotations

from pathlib import Path

from palate.errors import ModelError, RunError
from palate.rundir.checkpoints import checkpoint
from palate.rundir.config import description_in


def model_in(directory: Path) -> Path:
    """Return the directory of a run's last finished checkpoint; return any other directory unchanged.

    Raises:
        ModelError: the run has no finished checkpoint, or its checkpoints cannot be read.
    """
    try:
        described = description_in(directory)
    except RunError:  # a broken config.json: loading the model reports it
        described = None
    if described is None:
        return directory
    try:
        return checkpoint(directory)
    except RunError as error:
        raise ModelError(str(error)) from None
