"""The start and the end of a world: from the environment that torchrun or `palate run --processes` sets."""

from __future__ import annotations

import faulthandler
import logging
import os
import signal
import socket
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType, TracebackType

from palate.errors import ConfigError
from palate.world.base import Alone, World, cause_of, current, use
from palate.world.ending import INTERRUPTED, MISTAKE, ending_of

LIMIT = 1800.0
"""Default of the longest wait for another process, in seconds."""

START_LIMIT = 300.0
"""Longest wait for the start of all processes, in seconds."""


def processes_around(environ: Mapping[str, str] = os.environ) -> int:
    """Return the number of processes that a launcher has started together with this one; 1 without any."""
    return int(environ.get("WORLD_SIZE", "1")) if "RANK" in environ else 1


def threads_of(total: int | None, environ: Mapping[str, str] = os.environ) -> int | None:
    """Return the threads of this process: its share of those of the machine; None for torch's default.

    Args:
        total: number of threads of all processes on this machine; None for the number of cores.
        environ: the environment, with the number of processes on this machine.
    """
    here = int(environ.get("LOCAL_WORLD_SIZE", "1")) if processes_around(environ) > 1 else 1
    if here == 1:
        return total
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, (total or cores) // here)


class Together:
    """The world of a run, as a context manager.

    Without a launcher it is the current world, which is `Alone` by default. With one, the first run of the
    process joins the others; later runs use the same world.

    Args:
        processes: number of processes that the configuration names; None for any.
        limit: longest wait for another process, in seconds; see `Processes`.

    Raises:
        ConfigError: the launcher has started another number of processes.
        ProcessError: the others cannot be reached.
    """

    def __init__(self, processes: int | None = None, limit: float = LIMIT) -> None:
        size = processes_around()
        if processes is not None and processes != size:
            raise ConfigError(
                f"processes is {processes}, but {size} {'is' if size == 1 else 'are'} running; use "
                f"`palate run METHOD --processes {processes}`, or `torchrun --nproc-per-node {processes} ...`"
            )
        if size > 1 and isinstance(current(), Alone):
            use(_joined(size, limit))

    def __enter__(self) -> World:
        """Return the world."""
        self._guard(True)
        return current()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End with the other processes. An error that another process reports ends this one silently."""
        self._guard(False)
        world = current()
        if isinstance(world, Alone) or error is None:
            return
        from palate.world.group import Processes

        assert isinstance(world, Processes)
        ended = cause_of(error)
        if not world.close(ended):
            ending = ending_of(ended, world.rank)
            raise SystemExit(INTERRUPTED if ending.interrupted else MISTAKE) from error
        if ended is not error:
            raise ended from error

    def _guard(self, on: bool) -> None:
        """Let the world end this process if the others end without its notice, or stop it from doing so."""
        world = current()
        if not isinstance(world, Alone):
            from palate.world.group import Processes

            assert isinstance(world, Processes)
            world.guarded = on


def _joined(size: int, limit: float) -> World:
    """Connect to the launcher's store, and to the other processes."""
    from datetime import timedelta

    import torch
    from torch._C._distributed_c10d import PrefixStore, TCPStore

    from palate.world.group import Processes

    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", "0"))
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if _is_this_machine(host):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo0" if os.uname().sysname == "Darwin" else "lo")
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(local % torch.cuda.device_count())
        backend = "cpu:gloo,cuda:nccl"
    hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    store = TCPStore(
        host, port, is_master=hosts, timeout=timedelta(seconds=START_LIMIT), wait_for_workers=False
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    if not faulthandler.is_enabled():
        with suppress(AttributeError, RuntimeError, ValueError):  # stderr may be no file
            faulthandler.enable()  # a crash in the libraries then says where each thread was
    if rank > 0:  # process 0 says the same
        logging.getLogger("palate").setLevel(logging.ERROR)
    return Processes(PrefixStore(f"palate/{attempt}", store), rank, size, limit=limit, backend=backend)


def _is_this_machine(host: str) -> bool:
    return (
        host in ("localhost", "127.0.0.1", "::1")
        and int(os.environ.get("LOCAL_WORLD_SIZE", "0")) == processes_around()
    )


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End the run as Ctrl-C does, once: a terminal and a launcher may both send the signal."""
    for one in (signal.SIGINT, signal.SIGTERM):
        signal.signal(one, signal.SIG_IGN)
    raise KeyboardInterrupt


def free_socket() -> socket.socket:
    """Return a listening socket on this machine's own address, which no other machine reaches."""
    listening = socket.socket()
    listening.bind(("127.0.0.1", 0))
    listening.listen(128)
    return listening
