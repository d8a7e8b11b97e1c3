"""Freed memory stays with the process, unless the user has chosen otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

LARGE = """
import ctypes, os, sys
from palate.model.freed import keep_freed_memory
kept = keep_freed_memory('cpu')
import torch
def held():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
before = held()
parts = [torch.ones(5 << 20) for _ in range(12)]  # 20 MiB each
full = held() - before
del parts
print(kept, (held() - before) / full)
"""


def run(**environment: str) -> tuple[str, float]:
    """Whether the process keeps freed memory, and the share of 240 MiB that it still holds."""
    base = {
        name: value for name, value in os.environ.items() if not name.startswith(("GLIBC", "MALLOC", "LD_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", LARGE], env=base | environment, capture_output=True, text=True, check=True
    )
    kept, share = done.stdout.split()
    return kept, float(share)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only glibc has the options")
def test_memory_is_kept_for_the_next_tensors() -> None:
    kept, share = run()
    if kept == "False":
        pytest.skip("this C library has no such options")
    assert share > 0.9


@pytest.mark.parametrize(
    "choice",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_threshold=1000000"}],
    ids=["variable", "tunable"],
)
def test_a_users_choice_is_kept(choice: dict[str, str]) -> None:
    kept, _ = run(**choice)
    assert kept == "False"
