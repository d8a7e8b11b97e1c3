"""Errors in writing the files of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from palate.errors import AGAIN, RunError


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error in writing a file of the run into one that says which data are safe.

    Raises:
        RunError: the file cannot be written.
    """
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise RunError(
            f"{str(path)!r} cannot be written: {reason}; the journal and the checkpoints "
            f"are safe, {AGAIN} to resume"
        ) from error
