"""Shares of work: item i belongs to process i modulo the number of processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from palate.world.base import current

T = TypeVar("T")


def own_part(items: Sequence[T]) -> Sequence[T]:
    """Return this process's items; all of them if it works alone."""
    world = current()
    return items if world.size == 1 else items[world.rank :: world.size]


def join(parts: Sequence[Sequence[T]], count: int) -> list[T]:
    """Return the `count` items in their order, from the parts of all processes."""
    return [parts[i % len(parts)][i // len(parts)] for i in range(count)]


def shared_rows(name: str, items: Sequence[T], compute: Callable[[Sequence[T]], Sequence[Any]]) -> list[Any]:
    """Compute a result for each item, each process those of its own items, and return all of them in order.

    Args:
        name: of the collective, in messages.
        items: the same in every process.
        compute: returns one result per item, of the types of `World.gather`; it also gets an empty part.
    """
    own = own_part(items)
    parts = current().gather(name, list(compute(own)))
    return join(parts, len(items))
