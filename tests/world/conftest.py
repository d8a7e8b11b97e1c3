"""Several processes that find each other, as a launcher starts them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

import pytest
from torch.distributed import TCPStore

SCENARIOS = Path(__file__).with_name("scenarios.py")

Ended = list[subprocess.CompletedProcess[str]]
Start = Callable[..., Ended]


@pytest.fixture(scope="session")
def start() -> Iterator[Start]:
    """Starts `scenarios.py` with arguments in two processes, and waits for both."""
    running: list[subprocess.Popen[str]] = []

    def starting(*arguments: str, directories: Sequence[Path | None] = (None, None), **environ: str) -> Ended:
        store = TCPStore("127.0.0.1", 0, None, True, timedelta(seconds=60), wait_for_workers=False)
        for rank, directory in enumerate(directories):
            running.append(
                subprocess.Popen(
                    [sys.executable, str(SCENARIOS), *arguments],
                    env={**os.environ, **placed(rank, len(directories), store.port), **environ},
                    cwd=directory,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        ended = []
        for process in running:
            out, err = process.communicate(timeout=1200)
            ended.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        running.clear()
        return ended

    yield starting
    for process in running:
        process.kill()


def placed(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "OMP_NUM_THREADS": "1",
    }
