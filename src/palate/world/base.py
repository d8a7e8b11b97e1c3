"""The world of a run: the protocol of its processes, and the default of one process.

All processes of a run execute the same code with the same arguments. A part that splits its work asks
`current()` for the world, computes the share of its rank, and gathers the results, so its callers get the
same value in every process. What may differ between processes (annotators, the clock, files) happens in
process 0 alone, inside `lead`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

T = TypeVar("T")


class World(Protocol):
    """The processes that train together.

    Each method below is a collective: every process calls it, in the same order and with the same name. A
    process that waits for another checks that the other one lives and is at the same place.

    Attributes:
        rank: number of this process, from 0; process 0 leads: it owns the run's files.
        size: number of processes; 1 inside `lead`, where process 0 works by itself.
    """

    @property
    def rank(self) -> int:
        """Number of this process."""

    @property
    def size(self) -> int:
        """Number of processes that work together at this point."""

    @property
    def leads(self) -> bool:
        """True in process 0."""

    def lead(self, name: str, compute: Callable[[], T]) -> T:
        """Call a function in process 0 only, and return its value in every process.

        Args:
            name: of the collective, in messages.
            compute: returns JSON values, bytes and numpy arrays; tuples arrive as lists.

        Raises:
            PalateError: the function raised it; every process raises the same.
        """

    def gather(self, name: str, value: T) -> list[T]:
        """Return the values of all processes, by rank; the types are those of `lead`."""

    def agree(self, subject: str, value: str) -> None:
        """Check that a value is equal in every process.

        Raises:
            RunError: it is not; the message has the subject and the processes.
        """

    def sum(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by the sum over the processes, which has the same bits in each of them."""

    def broadcast(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of process 0."""

    def lost(self) -> BaseException | None:
        """Return the error of another process that has ended or died; None if all live. No collective."""


class Alone:
    """The world of one process."""

    rank = 0
    size = 1
    leads = True

    def lead(self, name: str, compute: Callable[[], T]) -> T:
        """Return what the function returns."""
        return compute()

    def gather(self, name: str, value: T) -> list[T]:
        """Return a list of the value."""
        return [value]

    def agree(self, subject: str, value: str) -> None:
        """Do nothing."""

    def sum(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Do nothing."""

    def broadcast(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Do nothing."""

    def lost(self) -> BaseException | None:
        """Return None."""
        return None


_world: World = Alone()


def current() -> World:
    """Return the world of this process."""
    return _world


def use(world: World) -> None:
    """Make a world that of this process."""
    global _world
    _world = world


def cause_of(error: BaseException) -> BaseException:
    """Return the error of another process if an error follows from it, else the error itself.

    A collective inside of torch fails as a RuntimeError if another process has ended.
    """
    return (current().lost() if isinstance(error, RuntimeError) else None) or error


@contextmanager
def one_at_a_time() -> Iterator[None]:
    """Let process 0 do something before the others, such as filling a cache on disk."""
    world = current()
    if world.size == 1:
        yield
        return
    if world.leads:
        yield
    world.gather("turns", None)
    if not world.leads:
        yield
