"""Errors of the libraries that load a model, explained in one sentence."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from palate.config import EMBEDDED
from palate.errors import ModelError

_LIBRARY_ERRORS = (
    OSError, ValueError, KeyError, RuntimeError, ImportError, TypeError, AttributeError, SafetensorError,
)  # fmt: skip
"""Errors that transformers, peft and safetensors raise if they cannot load a model."""


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn a library's error about the model `name` into a ModelError with advice.

    Raises:
        ModelError: a library could not load the model.
    """
    try:
        yield
    except _LIBRARY_ERRORS as error:
        if isinstance(error, ModelError):
            raise
        text = " ".join(str(error).split())
        if "trust_remote_code" in text:
            raise ModelError(
                f"model {name!r} comes with its own Python code; read it, then allow it with "
                "--trust-remote-code"
            ) from error
        raise ModelError(f"model {name!r} could not be loaded: {_hint(name)} ({text[:200]})") from error


def _hint(name: str) -> str:
    if os.path.isdir(name):
        return "is it complete?"
    if difflib.get_close_matches(name, [EMBEDDED]):
        return f"did you mean `{EMBEDDED}`?"
    return f"check the id and the connection, or use `{EMBEDDED}`, which needs no connection"
