"""`palate run --processes N`: start N processes of the same command on this machine, and end with them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import timedelta

from palate.world.ending import INTERRUPTED, MISTAKE
from palate.world.start import free_socket

GRACE, LAST = 15.0, 30.0
"""Seconds after the end of one process until the others are asked to end; then, until they are killed."""

_PAUSE = 0.1


def launch(command: Sequence[str], count: int) -> int:
    """Run a command in `count` processes that find each other, and return the exit code of the whole.

    If one process ends with an error or is killed, the others notice and end by themselves; those that do
    not are ended. Process 0 has standard output.

    Args:
        command: the program with its arguments.
        count: number of processes.
    """
    from torch._C._distributed_c10d import TCPStore

    with free_socket() as listening:
        port = listening.getsockname()[1]
        store = TCPStore(  # it outlives every process, so the last words of each stay readable
            "127.0.0.1",
            port,
            is_master=True,
            timeout=timedelta(seconds=60),
            wait_for_workers=False,
            master_listen_fd=os.dup(listening.fileno()),
        )
        running = [_start(command, rank, count, port) for rank in range(count)]
        signal.signal(signal.SIGTERM, lambda number, frame: _signal(running, signal.SIGTERM))
        try:
            codes = _wait(running)
        finally:
            for process in running:
                if process.poll() is None:
                    process.kill()
            del store
    return _code(codes)


def _start(command: Sequence[str], rank: int, count: int, port: int) -> subprocess.Popen[bytes]:
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "TORCHELASTIC_USE_AGENT_STORE": True,
    }
    environ = os.environ | {name: str(value) for name, value in place.items()}
    return subprocess.Popen(
        list(command), env=environ, stdin=None if rank == 0 else subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
    )  # fmt: skip


def _wait(running: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Wait for all processes; after the first failure, for a limited time."""
    failed: float | None = None
    signalled = False
    while any(process.poll() is None for process in running):
        try:
            time.sleep(_PAUSE)
        except KeyboardInterrupt:  # a terminal sends it to the processes too
            failed = failed or time.monotonic()
        if failed is None and any(process.returncode for process in running):
            failed = time.monotonic()
        late = 0.0 if failed is None else time.monotonic() - failed
        if late > GRACE and not signalled:
            signalled = True
            _signal(running, signal.SIGTERM)
        if late > GRACE + LAST:
            _signal(running, signal.SIGKILL)
    return [process.returncode for process in running]


def _signal(running: Sequence[subprocess.Popen[bytes]], number: signal.Signals) -> None:
    for process in running:
        if process.poll() is None:
            process.send_signal(number)


def _code(codes: Sequence[int]) -> int:
    """Return the exit code of the whole: that of an error before that of an interruption or a kill."""
    failed = [code for code in codes if code]
    if not failed:
        return 0
    for known in (MISTAKE, INTERRUPTED):
        if known in failed:
            return known
    own = [code for code in failed if code > 0]
    if own:  # the launcher has killed the others
        return own[0]
    print(f"palate: all processes were ended by signal {-failed[0]}", file=sys.stderr)
    return 128 - failed[0]
