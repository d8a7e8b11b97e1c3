"""The kinds of reward and judge that a spec such as `length:40` or `server:MODEL@URL` can name.

A package adds its own by an entry point. In the group `palate.rewards` it is a function that takes the text
behind the colon (None if there is no colon) and the model options, and returns a `Scorer`. In `palate.judges`
it is one that takes the text behind the colon and a `JudgeContext`, and returns a `JudgeModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from palate.errors import AnnotatorError

Maker = Callable[..., Any]


class Registry(Mapping[str, Maker]):
    """Makers by kind: those that come with Palate, and those that installed packages add.

    Args:
        group: of entry points.
        own: makers that come with Palate; a package cannot replace one.
    """

    def __init__(self, group: str, own: Mapping[str, Maker]) -> None:
        self._group, self._own = group, dict(own)

    def __getitem__(self, kind: str) -> Maker:
        """The maker for a kind. Raises KeyError without one, AnnotatorError where its package fails."""
        if kind in self._own:
            return self._own[kind]
        entry = self._plugins()[kind]
        try:
            maker = entry.load()
        except (ImportError, AttributeError) as error:
            raise AnnotatorError(
                f"{kind!r} comes from the entry point {entry.value!r}, whose import fails: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not callable(maker):
            raise AnnotatorError(
                f"{kind!r} comes from the entry point {entry.value!r}, which cannot be called"
            )
        return maker  # type: ignore[no-any-return]

    def __iter__(self) -> Iterator[str]:
        """The kinds, own ones first."""
        return iter(dict.fromkeys([*self._own, *self._plugins()]))

    def __len__(self) -> int:
        """How many kinds there are."""
        return len(list(iter(self)))

    def _plugins(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self._group)}
