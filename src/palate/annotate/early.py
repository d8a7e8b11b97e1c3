"""Annotation in the background, beside other work such as sampling and learning."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

from palate.annotate.base import Annotator
from palate.memory import group_key, key_of
from palate.types import Group

TOGETHER = 32
"""Most groups in one call of the annotator; so many that a server can answer at once, and no more."""


class Early:
    """Annotates groups in a thread as soon as they are given to `begin`.

    A later call returns the results that exist and annotates the other groups itself. A failure in the thread
    has no effect: the later call asks again, and fails itself. It suits annotators that wait for a server; a
    model in this process would compete with the work beside it.

    Args:
        annotate: the annotator. It is never called twice at the same time.
    """

    def __init__(self, annotate: Annotator) -> None:
        self._annotate = annotate
        self._calling = threading.Lock()
        self._changed = threading.Condition()
        self._waiting: dict[str, Group] = {}
        self._under_way: frozenset[str] = frozenset()
        self._results: dict[str, Group] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="palate-judge")
        self._busy = self._closed = False

    def begin(self, group: Group) -> None:
        """Annotate a group in the background."""
        with self._changed:
            if self._closed:
                return
            self._waiting.setdefault(_key(group), group)
            if not self._busy:
                self._busy = True
                self._thread.submit(self._drain)

    def __call__(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with rewards; wait for those of them that are under way."""
        keys = [_key(group) for group in groups]
        with self._changed:
            self._changed.wait_for(lambda: not any(k in self._waiting or k in self._under_way for k in keys))
            known = {key: self._results.pop(key) for key in set(keys) if key in self._results}
        rest = {key: group for key, group in zip(keys, groups, strict=True) if key not in known}
        if rest:
            known |= dict(zip(rest, self._call(list(rest.values())), strict=True))
        return [known[key] for key in keys]

    def close(self) -> None:
        """Drop the groups that wait, and wait for the call under way, whose verdicts cost money."""
        with self._changed:
            self._closed = True
            self._waiting.clear()
        self._thread.shutdown(wait=True)

    def _call(self, groups: Sequence[Group]) -> list[Group]:
        with self._calling:
            return self._annotate(groups)

    def _drain(self) -> None:
        """Annotate until no group waits. After a failure none waits: a later call annotates them itself."""
        ended = False
        try:
            while taken := self._take():
                annotated = self._call(list(taken.values()))
                with self._changed:
                    self._results.update(zip(taken, annotated, strict=True))
                    self._under_way = frozenset()
                    self._changed.notify_all()
            ended = True
        finally:
            if not ended:
                with self._changed:
                    self._waiting.clear()
                    self._under_way, self._busy = frozenset(), False
                    self._changed.notify_all()

    def _take(self) -> dict[str, Group]:
        with self._changed:
            taken = {key: self._waiting.pop(key) for key in list(self._waiting)[:TOGETHER]}
            self._under_way = frozenset(taken)
            self._busy = bool(taken)
            return taken


def _key(group: Group) -> str:
    return key_of(dict(group.prompt.columns), group_key(group))


def beginning(annotate: Annotator) -> Callable[[Group], None] | None:
    """Return the function that begins the annotation of a group early; None if the annotator has none."""
    begin: Callable[[Group], None] | None = getattr(annotate, "begin", None)
    return begin
