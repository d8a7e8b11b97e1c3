"""A world of several processes over torch.distributed.

Values travel in a gloo group on the CPU; tensors on a GPU are summed by NCCL. Beside it stands a small store
of names: each process writes there which collective it is in, that it lives, and the error that it ends with.
A process that waits reads them, so it never waits for a process that is dead or at another place.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, Store

from palate import errors
from palate.errors import AGAIN, PalateError, ProcessError, RunError
from palate.world.ending import INTERRUPTED, MISTAKE, Ending, ending_of, raised
from palate.world.guard import GRACE, Guard
from palate.world.wire import INLINE, decode, digest_of, encode, header_of, length_of

T = TypeVar("T")

BUCKET = 16 << 20
"""Most numbers that are summed in one message."""

LOOK, LATE, SILENT = 0.25, 2.0, 120.0
"""Seconds between two looks at the store; until another place is an error; until silence counts as death."""

BEAT = 1.0
"""Seconds between two signs of life."""


@dataclass
class Traffic:
    """The messages of collectives of one name.

    Attributes:
        calls: number of collectives.
        bytes: bytes that this process gave or got, once for each collective.
        seconds: time within the collectives, waiting included.
    """

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class Processes:
    """One process among several; see `World` for the methods.

    Args:
        store: a store that all processes share.
        rank, size: number of this process and of all.
        limit: longest wait for a process that is on its way to a collective, in seconds. A process that leads
            may take longer, as long as it lives.
        backend: of torch.distributed, such as `gloo`, or `cpu:gloo,cuda:nccl`.

    Attributes:
        traffic: the messages so far, by name of the collective.
        guarded: True while this process is to end if another one has ended and it does not notice: within a
            run, and until its main thread has an error of its own.

    Raises:
        ProcessError: the other processes have not started within the limit.
    """

    def __init__(self, store: Store, rank: int, size: int, *, limit: float, backend: str = "gloo") -> None:
        self.rank = rank
        self.traffic: defaultdict[str, Traffic] = defaultdict(Traffic)
        self.guarded = False
        self._count = size
        self._limit = limit
        self._solo = self._calls = 0
        self._store = store
        self._beats = dict.fromkeys(range(size), (b"", time.monotonic()))
        self._stop = threading.Event()
        try:
            dist.init_process_group(
                backend,
                store=PrefixStore("group", store),
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=limit + LATE),
            )
            # `_wait` has the limits of this group: a process that leads may take longer than others.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        except (RuntimeError, ValueError) as error:
            first = str(error).splitlines()[0]
            raise ProcessError(
                f"process {rank} of {size} cannot reach the others: {first}; start all of them with the same "
                "torchrun command"
            ) from error
        threading.Thread(target=self._live, daemon=True, name="palate-lives").start()

    @property
    def size(self) -> int:
        """Number of processes; 1 while process 0 leads."""
        return 1 if self._solo else self._count

    @property
    def leads(self) -> bool:
        """True in process 0."""
        return self.rank == 0

    def lead(self, name: str, compute: Callable[[], T]) -> T:
        """Call the function in process 0, and return its value."""
        if self._solo:
            return compute()
        raw = b""
        if self.leads:
            self._note(name, ahead=1)
            with self._by_itself():
                try:
                    raw = encode({"value": compute()})
                except PalateError as error:
                    own: Any = {"error": [type(error).__name__, str(error)]}
                    self._send(name, encode(own))
                    raise
        with self._measured(name) as traffic:
            raw = self._send(name, raw)
            traffic.bytes += len(raw)
        answer = decode(raw)
        if "error" in answer:
            kind, message = answer["error"]
            raise getattr(errors, kind, RunError)(message)
        return answer["value"]  # type: ignore[no-any-return]

    def gather(self, name: str, value: T) -> list[T]:
        """Exchange values."""
        if self._solo:
            return [value]
        raw = encode(value)
        with self._measured(name) as traffic:
            headers = self._all(name, header_of(name, raw))
            for rank, header in enumerate(headers):
                self._check_header(name, rank, header)
            lengths = [length_of(header) for header in headers]
            if max(lengths) > INLINE:
                padded = raw.ljust(max(lengths), b"\0")
                whole = self._all(name, torch.frombuffer(bytearray(padded), dtype=torch.uint8))
            else:
                whole = [header[16:] for header in headers]
            traffic.bytes += sum(lengths)
        return [decode(bytes(part[:n].numpy())) for part, n in zip(whole, lengths, strict=True)]

    def agree(self, subject: str, value: str) -> None:
        """Compare a value with those of the other processes."""
        values = self.gather(f"agreement on {subject}", value)
        for rank, other in enumerate(values):
            if other != values[0]:
                raise RunError(
                    f"{subject} differs between the processes: process {rank} of {self._count} has "
                    f"{other[:12]}, process 0 has {values[0][:12]}; give every process the same command and "
                    "the same files"
                )

    def sum(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Add up tensors in buckets."""
        if self._solo:
            return
        with self._measured(name) as traffic:
            for bucket in _buckets(tensors):
                flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
                # Gloo's mean was a sum in some versions of torch, so only sums are used.
                self._run(
                    name,
                    partial(dist.all_reduce, flat, dist.ReduceOp.SUM, self._group_of(flat), async_op=True),
                )
                for tensor, part in zip(bucket, torch.split(flat, [t.numel() for t in bucket]), strict=True):
                    tensor.copy_(part.view_as(tensor))
                traffic.bytes += flat.numel() * flat.element_size()

    def broadcast(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Send tensors one after the other, which needs no further memory."""
        if self._solo:
            return
        with self._measured(name) as traffic:
            for tensor in tensors:
                whole = tensor.detach().contiguous()
                self._run(name, partial(dist.broadcast, whole, 0, self._group_of(whole), async_op=True))
                tensor.detach().copy_(whole)
                traffic.bytes += whole.numel() * whole.element_size()

    # -- the end of the processes ------------------------------------------------------------------

    def close(self, error: BaseException | None) -> bool:
        """Publish that this process ends; return True if it is the one to report its error."""
        if error is None:
            self.gather("end", None)
        self._stop.set()
        if error is None:
            return False
        with suppress(RuntimeError):  # process 0 may have had the store, and be dead
            return ending_of(error, self.rank).publish(self._store)
        return True

    # -- inside ------------------------------------------------------------------------------------

    @contextmanager
    def _by_itself(self) -> Iterator[None]:
        self._solo += 1
        try:
            yield
        finally:
            self._solo -= 1

    @contextmanager
    def _measured(self, name: str) -> Iterator[Traffic]:
        traffic, began = self.traffic[name], time.perf_counter()
        yield traffic
        traffic.calls += 1
        traffic.seconds += time.perf_counter() - began

    def _send(self, name: str, raw: bytes) -> bytes:
        """Return the bytes that process 0 has."""
        header = header_of(name, raw)
        self._run(name, lambda: dist.broadcast(header, 0, self._group, async_op=True))
        self._check_header(name, 0, header)
        length = length_of(header)
        if length <= INLINE:
            return bytes(header[16 : 16 + length].numpy())
        whole = torch.frombuffer(bytearray(raw.ljust(length, b"\0")), dtype=torch.uint8)
        self._run(name, lambda: dist.broadcast(whole, 0, self._group, async_op=True))
        return bytes(whole.numpy())

    def _all(self, name: str, own: Tensor) -> list[Tensor]:
        parts = [torch.empty_like(own) for _ in range(self._count)]
        self._run(name, lambda: dist.all_gather(parts, own, self._group, async_op=True))
        return parts

    def _run(self, name: str, start: Callable[[], Any]) -> None:
        self._calls += 1
        self._note(name)
        try:
            self._wait(name, start())
        except (RuntimeError, PalateError, KeyboardInterrupt) as error:
            self.guarded = False  # the main thread has noticed
            if not isinstance(error, RuntimeError):
                raise
            # The other end of a connection is closed, or torch has a reason of its own.
            reason = f"the processes cannot do {name!r} together: {(str(error).splitlines() or ['?'])[0]}"
            raise self.lost() or ProcessError(reason) from error

    def _wait(self, name: str, work: Any) -> None:
        began = time.monotonic()
        look = began + LOOK
        while not work.is_completed():
            now = time.monotonic()
            time.sleep(min(0.01, 0.0001 + (now - began) / 50))
            if now >= look:
                self._check_others(name, now - began)
                look = now + LOOK
        work.wait()

    def _group_of(self, tensor: Tensor) -> Any:
        """Return the group that a tensor travels in: for one on a GPU, that of NCCL."""
        return self._group if tensor.device.type == "cpu" else None

    def _note(self, name: str, *, ahead: int = 0) -> None:
        try:
            self._store.set(f"at/{self.rank}", f"{self._calls + ahead} {name}")
        except RuntimeError as error:  # the process that has the store is dead
            raise self._lost() from error

    def _live(self) -> None:
        """Give signs of life, and watch over the others for a main thread that waits inside of torch."""
        beats, guard = 0, Guard(self._ended)
        try:
            while not self._stop.wait(BEAT):
                beats += 1
                self._store.set(f"beat/{self.rank}", str(beats))
                error = guard.overdue() if self.guarded and not self._solo else None
                if error is not None:
                    self._give_up(error)
        except RuntimeError:  # the process that has the store is dead
            if not self._stop.wait(GRACE) and self.guarded:
                self._give_up(self._dead([]))

    def _ended(self) -> BaseException | None:
        """Return the error of another process that has ended, or that is silent; None if all live."""
        ending = Ending.published(self._store)
        if ending is not None and ending.rank != self.rank:
            return raised(ending, self._count)
        silent = [rank for rank in self._others() if self._silent_for(rank) > SILENT]
        return self._silent(silent[0]) if silent else None

    def _give_up(self, error: BaseException) -> None:
        """End this process, whatever its main thread waits for."""
        if self.close(error):
            print(f"palate: {error}", file=sys.stderr, flush=True)
        os._exit(INTERRUPTED if isinstance(error, KeyboardInterrupt) else MISTAKE)

    def _check_header(self, name: str, rank: int, header: Tensor) -> None:
        if bytes(header[:8].numpy()) != digest_of(name):
            raise self._apart(name, rank)

    def _apart(self, name: str, rank: int) -> ProcessError:
        return ProcessError(
            f"the processes are at different places: process {self.rank} at {name!r}, process {rank} at "
            f"{self._place(rank)[1]!r}; give every process the same command, files and packages"
        )

    def _place(self, rank: int) -> tuple[int, str]:
        """Return the number and the name of a process's last collective."""
        if not self._store.check([f"at/{rank}"]):
            return 0, "its start"
        calls, _, name = self._store.get(f"at/{rank}").decode().partition(" ")
        return int(calls), name

    def _check_others(self, name: str, waited: float) -> None:
        """Raise an error if the process that this one waits for has failed or will not come."""
        if (ending := Ending.published(self._store)) is not None:
            raise raised(ending, self._count)
        if waited < LATE:
            return
        for rank in self._others():
            calls, place = self._place(rank)
            if calls == self._calls and place != name:
                raise self._apart(name, rank)
            if self._silent_for(rank) > SILENT:
                raise self._silent(rank)
            if calls < self._calls and waited > self._limit:
                raise ProcessError(
                    f"process {rank} of {self._count} did not reach {name!r} within {self._limit:.0f} s, it "
                    f"is at {place!r}; {AGAIN} to resume, with a larger --process-limit if it only needs time"
                )

    def _silent(self, rank: int) -> ProcessError:
        return ProcessError(
            f"process {rank} of {self._count} has given no sign of life for {SILENT:.0f} s; end it, and "
            f"{AGAIN} to resume"
        )

    def _others(self) -> list[int]:
        return [rank for rank in range(self._count) if rank != self.rank]

    def _silent_for(self, rank: int) -> float:
        """Return the seconds since a process's last sign of life that this process has seen."""
        key, now = f"beat/{rank}", time.monotonic()
        beat = self._store.get(key) if self._store.check([key]) else b""
        known, since = self._beats[rank]
        if beat != known:
            self._beats[rank] = beat, now
            return 0.0
        return now - since

    def lost(self) -> BaseException | None:
        """Return the error of a process that has ended, or that a process has died; None if all live.

        It takes some seconds, since a dead process is known by its silence.
        """
        dead: list[int] = []
        with suppress(RuntimeError):  # process 0 may have had the store
            for _ in range(3):
                if (ending := Ending.published(self._store)) is not None:
                    return raised(ending, self._count)
                for rank in self._others():
                    self._silent_for(rank)
                time.sleep(BEAT)
            dead = [rank for rank in self._others() if self._silent_for(rank) > 1.5 * BEAT]
            if not dead:
                return None
        return self._dead(dead)

    def _lost(self) -> BaseException:
        """Return the error for a closed connection: that of the process behind it, if it left one."""
        return self.lost() or self._dead([])

    def _dead(self, ranks: list[int]) -> ProcessError:
        named = " and ".join(f"process {rank}" for rank in ranks) or "another process"
        return ProcessError(
            f"{named} of {self._count} ended without an error message, as a process does that is killed or "
            f"out of memory; {AGAIN} to resume"
        )


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield runs of tensors of one format that are summed together."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > BUCKET
        if bucket and (full or (tensor.dtype, tensor.device) != (bucket[0].dtype, bucket[0].device)):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
