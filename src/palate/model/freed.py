"""Freed memory, which a process keeps for its next tensors."""

from __future__ import annotations

import ctypes
import os
import sys

KEPT = 1 << 30
"""Most bytes of freed memory at the end of the heap that stay with the process."""
MAPPED = 32 << 20
"""Size from which a tensor's memory is a mapping of its own, which goes back at once: glibc's largest."""
AHEAD = 64 << 20
"""Bytes by which the heap grows at a time."""

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # numbers of glibc's malloc.h
_CHOSEN = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")
_TUNED = ("trim_threshold", "mmap_threshold", "mmap_max", "top_pad")


def keep_freed_memory(device: str) -> bool:
    """Let glibc keep up to 1 GiB of freed memory, for work on a CPU, if the user has chosen nothing about it.

    Otherwise each layer's tensors go back to the system and come again, page by page, each cleared: a tenth
    of a learner's time (docs/performance.md). The most that a process holds does not change.

    Returns:
        True if that is now so. Other C libraries have no such options.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    chosen = any(name in os.environ for name in _CHOSEN) or any(name in tunables for name in _TUNED)
    if device != "cpu" or chosen or not sys.platform.startswith("linux"):
        return False
    choose = getattr(ctypes.CDLL(None), "mallopt", None)
    if choose is None:
        return False
    options = ((_MMAP_THRESHOLD, MAPPED), (_TRIM_THRESHOLD, KEPT), (_TOP_PAD, AHEAD))
    return all(choose(option, size) == 1 for option, size in options)
