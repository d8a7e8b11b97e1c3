"""Values between processes as bytes: JSON, with arrays beside it. No bytes that are read can run code."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

import numpy as np
import torch
from torch import Tensor

INLINE = 2048
"""Bytes of a value that travel together with its header; a longer value follows in a second message."""

_MARK = "\0"
"""Key of the mapping that stands for an array; a JSON mapping of the project has no such key."""


def encode(value: Any) -> bytes:
    """Return a value as bytes: JSON values, bytes and numpy arrays, in lists, tuples and mappings."""
    blobs: list[bytes] = []

    def plain(part: Any) -> Any:
        if isinstance(part, bytes):
            part = np.frombuffer(part, np.uint8)
            kind = "bytes"
        elif isinstance(part, np.ndarray):
            kind = part.dtype.str
        elif isinstance(part, list | tuple):
            return [plain(one) for one in part]
        elif isinstance(part, dict):
            assert _MARK not in part
            return {key: plain(one) for key, one in part.items()}
        else:
            return part
        blobs.append(part.tobytes())
        return {_MARK: [kind, list(part.shape), len(blobs[-1])]}

    text = json.dumps(plain(value), separators=(",", ":")).encode()
    return struct.pack("<q", len(text)) + text + b"".join(blobs)


def decode(raw: bytes) -> Any:
    """Return the value of `encode`; tuples are lists, and arrays can be written to."""
    (size,) = struct.unpack_from("<q", raw)
    at = 8 + size

    def rebuilt(part: Any) -> Any:
        nonlocal at
        if isinstance(part, list):
            return [rebuilt(one) for one in part]
        if not isinstance(part, dict):
            return part
        if part.keys() != {_MARK}:
            return {key: rebuilt(one) for key, one in part.items()}
        kind, shape, length = part[_MARK]
        own, at = raw[at : at + length], at + length
        return own if kind == "bytes" else np.frombuffer(own, np.dtype(kind)).reshape(shape).copy()

    return rebuilt(json.loads(raw[8:at]))


def header_of(name: str, raw: bytes) -> Tensor:
    """Return the hash of the name, the length, and the first bytes. uint8 (16 + INLINE,)"""
    content = digest_of(name) + np.int64(len(raw)).tobytes() + raw[:INLINE]
    return torch.frombuffer(bytearray(content.ljust(16 + INLINE, b"\0")), dtype=torch.uint8)


def length_of(header: Tensor) -> int:
    """Return the length in a header, in bytes."""
    return int(np.frombuffer(bytes(header[8:16].numpy()), np.int64)[0])


def digest_of(name: str) -> bytes:
    """Return the hash of a collective's name, 8 bytes."""
    return hashlib.blake2b(name.encode(), digest_size=8).digest()
