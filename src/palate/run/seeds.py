"""Seeds of a run: one independent random stream per purpose."""

from __future__ import annotations

import hashlib


def seed_of(seed: int, *names: str | int) -> int:
    """Return the seed of one purpose of a run, from the run's seed and the purpose's names."""
    text = ":".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=6).digest(), "little")
