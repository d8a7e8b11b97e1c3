"""A bound on the time that idle compute threads spin, since the processor is shared with other programs.

After each operation, OpenMP's threads wait for each other in a busy loop. If another program occupies a core,
the threads that run spin for a thread that does not, and a sampling step takes up to 15 times as long. With a
bound they hand their core over after a moment; on an idle machine the bound costs nothing measurable.
"""

from __future__ import annotations

import os
import sys

SPINS = "6000"
"""Rounds of GNU's busy loop; its default is 300,000 and more. Fewer rounds cost more on an idle machine, and
less beside a busy program (benchmarks/neighbour.py)."""
MILLISECONDS = "1"
"""Time in the busy loop of LLVM's and Intel's runtimes; their default is 200."""

CHOSEN = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables by which a user decides how threads wait."""


def bound_spinning() -> bool:
    """Bound the spinning of threads in this process and the processes that it starts.

    OpenMP reads its settings when torch is loaded, so the bound has no effect on this process after that.

    Returns:
        True if the bound was set: the user has set nothing about it, and torch is not loaded.
    """
    if "torch" in sys.modules or any(name in os.environ for name in CHOSEN):
        return False
    os.environ["GOMP_SPINCOUNT"], os.environ["KMP_BLOCKTIME"] = SPINS, MILLISECONDS
    return True
