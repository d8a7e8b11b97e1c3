"""The kinds of reward and judge that a spec such as `length:40` or `server:MODEL@URL` can name.

A package adds its own by an entry point. In the group `palate.rewards` it is a function that takes the text
after the colon (None without a colon) and the model options, and returns a `Scorer`. In `palate.judges`
it is a function that takes the text after the colon and a `JudgeContext`, and returns a `JudgeModel`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from palate.errors import AnnotatorError

Maker = Callable[..., Any]


class Registry(Mapping[str, Maker]):
    """Makers by kind: Palate's own and those from installed packages.

    Args:
        group: the name of the group of entry points.
        own: Palate's own makers; a package cannot replace one.
    """

    def __init__(self, group: str, own: Mapping[str, Maker]) -> None:
        self._group, self._own = group, dict(own)

    def __getitem__(self, kind: str) -> Maker:
        """Return the maker for a kind. Raise KeyError if unknown, AnnotatorError if its package fails."""
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
        """Iterate over the kinds, Palate's own first."""
        return iter(dict.fromkeys([*self._own, *self._plugins()]))

    def __len__(self) -> int:
        """Return the number of kinds."""
        return len(list(iter(self)))

    def _plugins(self) -> dict[str, EntryPoint]:
        return {entry.name: entry for entry in entry_points(group=self._group)}
