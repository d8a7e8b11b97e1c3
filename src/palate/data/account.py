"""The account of a data set: the rows and parts of rows that are not used, with the reasons."""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import Any

from palate.errors import DataError

MOST_EXAMPLES = 3
"""The most reasons that an error shows, the most frequent first."""
_MOST_LISTED = 10_000
"""The most skipped rows that are recorded one by one; all are counted."""

QUANTILES = {"shortest": 0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "99 %": 0.99, "longest": 1}
"""The quantiles of lengths that are shown."""


_TALLIES = ("dropped", "unused", "notes", "lost")

TRUNCATED = "answers are truncated"
"""The beginning of the notes on answers that do not fit the model's context."""
MOSTLY_TRUNCATED = 0.2
"""The share of truncated rows that a run warns about again at its end."""


class RowError(DataError):
    """A row of data cannot be used. `where` names the row, `reason` is the kind of fault."""

    def __init__(self, message: str, where: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.where, self.reason = where, reason or kind_of(message.removeprefix(f"{where}: "))

    def __reduce__(self) -> tuple[Any, ...]:
        """Return all parts, because exceptions are pickled to cross processes."""
        return type(self), (str(self), self.where, self.reason)


def kind_of(message: str) -> str:
    """Return the first clause of a message without numbers and quoted texts, to group similar errors."""
    clause = re.split(r"[;:(]|\. ", message, maxsplit=1)[0]
    clause = re.sub(r"'[^']*'|\"[^\"]*\"", "...", clause)
    return re.sub(r"\b\d+\b", "N", clause).strip().rstrip(".")


@dataclass
class Tally:
    """A number of rows, and the first of them."""

    count: int
    where: str
    last: str = ""
    """The last counted row: both answers of a pair count once."""

    def __str__(self) -> str:
        """Return a text such as `3 rows, first prefs.jsonl:12`."""
        rows = f"{self.count:,} row{'s' if self.count != 1 else ''}"
        return f"{rows}, first {self.where}" if self.where else rows


@dataclass(frozen=True)
class Skipped:
    """A row that is left out because it cannot be used."""

    where: str
    reason: str
    message: str


@dataclass
class Account:
    """Counts of rows that are read, skipped or left out, and of unused parts. A run shows the account.

    Args:
        strict: raise the error of the first row that cannot be used.
        max_bad_rows: the share of rows that may be skipped before `check` refuses the data; one row is always
            allowed.
    """

    strict: bool = False
    max_bad_rows: float = 0.01
    rows: int = 0
    """Rows read."""
    skipped: list[Skipped] = field(default_factory=list)
    """The rows that cannot be used, the first of them one by one."""
    reasons: Counter[str] = field(default_factory=Counter)
    """The number of skipped rows by reason."""
    dropped: dict[str, Tally] = field(default_factory=dict)
    """Valid rows that contain nothing to learn, such as pairs of two equal texts."""
    unused: dict[str, Tally] = field(default_factory=dict)
    """Columns, keys, turns and parts that are not used."""
    notes: dict[str, Tally] = field(default_factory=dict)
    """Unexpected changes to rows, such as truncated answers."""
    lost: dict[str, Tally] = field(default_factory=dict)
    """Parts of answers that should be learnt, but that the chat template does not render."""
    lengths: array[int] = field(default_factory=lambda: array("i"))
    """The tokens of each used row: its prompt, with the longest of its completions. int32"""
    by_row: bool = False
    """Keep `unused_of` too."""
    unused_of: dict[str, list[str]] = field(default_factory=dict)
    """The parts that are not used of each row, by the row's place."""

    def skip(self, error: DataError) -> None:
        """Count a row that cannot be used.

        Raises:
            DataError: the error itself, if the account is strict.
        """
        if self.strict:
            raise error
        where = getattr(error, "where", "")
        reason = getattr(error, "reason", "") or kind_of(str(error))
        self.reasons[reason] += 1
        if len(self.skipped) < _MOST_LISTED:
            self.skipped.append(Skipped(where, reason, str(error)))

    def drop(self, reason: str, where: str = "") -> None:
        """Count a valid row that contains nothing to learn."""
        _count(self.dropped, reason, where)

    def leave(self, name: str, where: str = "") -> None:
        """Count a row with a column, key, turn or part that is not used."""
        _count(self.unused, name, where)
        if self.by_row:
            self.unused_of.setdefault(where, []).append(name)

    def note(self, text: str, where: str = "") -> None:
        """Count a row with a change that the user should know about."""
        _count(self.notes, text, where)

    def lose(self, name: str, where: str = "") -> None:
        """Count a row whose answer has a part that the template does not render, so it cannot be learnt."""
        _count(self.lost, name, where)
        self.leave(name, where)

    def use(self, names: Collection[str] | None) -> None:
        """Mark columns as used, because a reward function may read them. None means all columns."""
        named = list(self.unused) if names is None else [f"column '{name}'" for name in names]
        for name in named:
            if name.startswith("column '"):
                self.unused.pop(name, None)

    @property
    def used(self) -> int:
        """The number of rows that are left to learn from."""
        return self.rows - self.bad - self.dropped_rows

    @property
    def dropped_rows(self) -> int:
        """Return the number of valid rows that contain nothing to learn."""
        return sum(tally.count for tally in self.dropped.values())

    @property
    def bad(self) -> int:
        """Return the number of rows that cannot be used."""
        return sum(self.reasons.values())

    def check(self, source: str, kept: int, needs: str = "Correct these rows.") -> None:
        """Refuse data with too few usable rows.

        Args:
            source: the name of the data, for the message.
            kept: the number of usable rows.
            needs: advice if no row can be used, such as the columns of this kind of data.

        Raises:
            DataError: more rows are bad than `max_bad_rows` allows, or no usable row is left.
        """
        allowed = max(1, int(self.max_bad_rows * self.rows))
        if self.bad and (self.bad > allowed or not kept):
            if self.bad == 1:
                raise DataError(self.skipped[0].message)
            if not kept:
                raise DataError(f"{source}: no row can be used. {self._commonest()} {needs}")
            raise DataError(
                f"{source}: {self.bad:,} of {self.rows:,} rows cannot be used (--max-bad-rows "
                f"{self.max_bad_rows:g} allows {allowed}). {self._commonest()} Correct or remove these rows, "
                "or allow more with --max-bad-rows."
            )
        if sum(tally.count for tally in self.lost.values()) > allowed:
            parts = " and ".join(f"{name} of the answers ({tally})" for name, tally in self.lost.items())
            raise DataError(
                f"{source}: the chat template does not render {parts}, so it would not be learnt; choose "
                "a template that does with --chat-template, put it into the content, or take it out of the "
                "data."
            )

    def _commonest(self) -> str:
        parts = []
        for reason, count in self.reasons.most_common(MOST_EXAMPLES):
            example = next((row.message for row in self.skipped if row.reason == reason), "")
            parts.append(f"{count:,} x {reason} ({example.rstrip('.')})")
        more = len(self.reasons) - len(parts)
        return "; ".join(parts) + (f"; and {more} other reasons." if more else ".")

    def overview(self) -> Iterator[str]:
        """Two lines: the rows that are used, and their lengths."""
        rows = f"{self.rows:,} row{'s' if self.rows != 1 else ''}"
        yield f"{rows}, all of them used" if self.used == self.rows else f"{self.used:,} of {rows} are used"
        if self.lengths:
            lengths = quantiles(self.lengths)
            yield (
                f"tokens per row: median {lengths['median']:,}, 90th percentile {lengths['90 %']:,}, "
                f"longest {lengths['longest']:,}"
            )

    def lines(self) -> Iterator[str]:
        """Yield one line for each thing that a user should know."""
        if self.bad:
            reasons = ", ".join(
                f"{count:,} x {reason}" for reason, count in self.reasons.most_common(MOST_EXAMPLES)
            )
            yield f"skipped {self.bad:,} of {self.rows:,} rows that cannot be used: {reasons}"
        for reason, tally in self.dropped.items():
            yield f"left out {tally}: {reason}"
        if self.unused:
            parts = "; ".join(f"{name} ({tally})" for name, tally in self.unused.items())
            yield f"not used: {parts}"
        yield from (f"{text} ({tally})" for text, tally in self.notes.items())

    def warnings(self) -> Iterator[str]:
        """Yield one line for each thing that is worth saying again at the end of a run."""
        for text, tally in self.notes.items():
            if text.startswith(TRUNCATED) and tally.count > MOSTLY_TRUNCATED * self.used:
                share = min(1.0, tally.count / max(1, self.used))
                yield (
                    f"{text} in {share:.0%} of the rows, and the model has learnt no end of these; raise "
                    "--max-length, or shorten or drop these rows"
                )

    def saved(self) -> dict[str, Any]:
        """Return all counts as JSON values, for `restore`; the lengths, one per row, are not among them."""
        return {
            "rows": self.rows,
            "skipped": [astuple(row) for row in self.skipped],
            "reasons": dict(self.reasons),
            **{name: {key: astuple(t) for key, t in getattr(self, name).items()} for name in _TALLIES},
        }

    def restore(self, saved: Mapping[str, Any], lengths: bytes = b"") -> None:
        """Replace all counts by those of `saved`, and the lengths by their bytes, which are saved apart."""
        self.rows, self.lengths = saved["rows"], array("i", lengths)
        self.skipped = [Skipped(*row) for row in saved["skipped"]]
        self.reasons = Counter(saved["reasons"])
        for name in _TALLIES:
            setattr(self, name, {key: Tally(*tally) for key, tally in saved[name].items()})

    def summary(self) -> dict[str, Any]:
        """Return the account as plain data, for config.json."""
        tallies = {"dropped": self.dropped, "unused": self.unused, "notes": self.notes}
        return {
            "rows": self.rows,
            "used": self.used,
            "tokens": quantiles(self.lengths),
            "skipped": dict(self.reasons),
            **{
                name: {key: {"rows": t.count, "first": t.where} for key, t in part.items()}
                for name, part in tallies.items()
            },
        }


def quantiles(values: Sequence[int]) -> dict[str, int]:
    """Return the `QUANTILES`: the smallest value that at least this share of them does not exceed."""
    ranked = sorted(values)
    places = {name: max(0, math.ceil(share * len(ranked)) - 1) for name, share in QUANTILES.items()}
    return {name: ranked[place] for name, place in places.items()} if len(ranked) else {}


def _count(tallies: dict[str, Tally], name: str, where: str) -> None:
    if name not in tallies:
        tallies[name] = Tally(1, where, where)
    elif not where or tallies[name].last != where:
        tallies[name].count += 1
        tallies[name].last = where
