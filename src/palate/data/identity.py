"""A key of the files of a data source, by their content: a copied, moved or touched file keeps its key."""

from __future__ import annotations

import hashlib
from pathlib import Path

from palate.given import GivenRows

_BLOCK = 1 << 20


def key_of_files(source: str) -> str | None:
    """Return the key of a file or of all files in a folder; None if the source is neither.

    Rows given in Python, the built-in prompts and names on the hub have no key.
    """
    if isinstance(source, GivenRows):
        return None
    path = Path(source).expanduser()
    folder = path if path.is_dir() else Path(source.rpartition(":")[0]).expanduser()
    try:
        if path.is_file():
            return file_key(path)
        if not source.rpartition(":")[0] and not path.is_dir():
            return None
        files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else []
        named = [f"{file.relative_to(folder).as_posix()} {file_key(file)}" for file in files]
    except OSError:  # reading the source explains it
        return None
    return hashlib.blake2b("\n".join(named).encode(), digest_size=16).hexdigest() if named else None


def file_key(path: Path) -> str:
    """Return a key of a file's whole content: its size and time may stay the same when that changes."""
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
