"""A run's directory as the name of a model: it stands for the run's last checkpoint."""

from __future__ import annotations

from pathlib import Path

from palate.errors import ModelError, RunError
from palate.rundir.checkpoints import checkpoint
from palate.rundir.config import description_in


def model_in(directory: Path) -> Path:
    """Return the directory itself or, if it holds a run, that of the run's last finished checkpoint.

    Raises:
        ModelError: the run has no checkpoint yet, or they cannot be read.
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
