"""The ledger of verdicts: one row per question and order, in a run's journal or a file across runs.

A request is recorded before it is sent and settled after its answer arrives. So a process killed at any
moment loses no answer that had arrived, and requests in flight count as spent.
"""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from pathlib import Path

from palate.annotate.judges.records import Amount, Question, Spent, Verdict
from palate.errors import RunError

_COLUMNS = tuple(field.name for field in fields(Verdict))

_TABLES = f"""
CREATE TABLE IF NOT EXISTS verdicts (
    key TEXT PRIMARY KEY, model TEXT NOT NULL, mode TEXT NOT NULL, labels TEXT NOT NULL,
    shown INTEGER NOT NULL, sample INTEGER NOT NULL, p_first REAL, source TEXT NOT NULL,
    at TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
    {", ".join(f'"{name}"' for name in _COLUMNS)}
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS requests (
    id INTEGER PRIMARY KEY, key TEXT NOT NULL, sent TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP, done TEXT,
    reserved_tokens INTEGER NOT NULL, reserved_cost REAL NOT NULL, tokens INTEGER, cost REAL
);
CREATE INDEX IF NOT EXISTS requests_by_key ON requests (key);
CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, reward REAL) WITHOUT ROWID;
"""

_INSERT = (
    f"INSERT OR REPLACE INTO verdicts (key, model, mode, labels, shown, sample, p_first, source,"
    f" {', '.join(_COLUMNS)}) VALUES ({', '.join('?' * (8 + len(_COLUMNS)))})"
)


class Ledger:
    """Verdicts and their costs.

    Every method is one transaction, on disk when the method returns. Several threads may share a ledger.

    Args:
        path: the SQLite file, such as a run's journal; `:memory:` saves nothing.
        cache: a file of verdicts that several runs share; None for no cache.

    Raises:
        RunError: a file is damaged or cannot be written. All methods raise it too.
    """

    def __init__(self, path: Path | str = ":memory:", cache: Path | None = None) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._reused = 0
        self._db = _opened(path)
        self._cache = None if cache is None else _opened(cache.expanduser())

    def close(self) -> None:
        """Close the files."""
        for db in (self._db, self._cache):
            if db is not None:
                db.close()

    # -- verdicts ----------------------------------------------------------------------------------

    def known(self, keys: Sequence[str]) -> dict[str, Verdict]:
        """Return the saved verdicts by key, without those that failed in transport."""
        with self._reading() as db:
            verdicts = {key: verdict for key in keys if (verdict := _verdict(db, key)) is not None}
        if self._cache is not None:
            self._copy([key for key in keys if key not in verdicts], verdicts)
        return verdicts

    def sent(self, key: str, reserved: Amount) -> int:
        """Record that a request is sent, and return its number."""
        with self._writing() as db:
            row = db.execute(
                "INSERT INTO requests (key, reserved_tokens, reserved_cost) VALUES (?, ?, ?)",
                (key, reserved.tokens, reserved.cost),
            )
            assert row.lastrowid is not None
            return row.lastrowid

    def settle(self, request: int, amount: Amount) -> None:
        """Record the cost of a request without a verdict."""
        with self._writing() as db:
            _settle(db, request, amount)

    def done(
        self, request: int, amount: Amount, question: Question, key: str, model: str, verdict: Verdict
    ) -> None:
        """Record the cost of a request and its verdict."""
        row = _row(question, key, model, verdict)
        with self._writing() as db:
            _settle(db, request, amount)
            db.execute(_INSERT, row)
        if self._cache is not None and verdict.status != "failed":
            with self._writing(self._cache) as db:
                db.execute(_INSERT, row)

    def spent(self) -> Spent:
        """Return the total spending of the run, over all of its starts."""
        with self._reading() as db:
            verdicts, requests, tokens, cost, unanswered = db.execute(
                "SELECT count(DISTINCT key), count(*), coalesce(sum(coalesce(tokens, reserved_tokens)), 0),"
                " coalesce(sum(coalesce(cost, reserved_cost)), 0.0), count(*) - count(done) FROM requests"
            ).fetchone()
            (reused,) = db.execute("SELECT count(*) FROM verdicts WHERE source = 'cache'").fetchone()
        return Spent(verdicts, requests, Amount(tokens, cost), unanswered, reused)

    def was_sent(self, key: str) -> bool:
        """Return True if a request for this question was sent before, with any outcome."""
        with self._reading() as db:
            return db.execute("SELECT 1 FROM requests WHERE key = ? LIMIT 1", (key,)).fetchone() is not None

    def counts(self) -> dict[str, int]:
        """Return the number of verdicts by status."""
        with self._reading() as db:
            return dict(db.execute("SELECT status, count(*) FROM verdicts GROUP BY status").fetchall())

    # -- answers of functions ----------------------------------------------------------------------

    def answers(self, keys: Sequence[str]) -> dict[str, float | None]:
        """Return the saved rewards of functions, by key."""
        with self._reading() as db:
            rows = [
                db.execute("SELECT key, reward FROM answers WHERE key = ?", (key,)).fetchone() for key in keys
            ]
        return {row[0]: row[1] for row in rows if row is not None}

    def keep_answers(self, rewards: Mapping[str, float | None]) -> None:
        """Save rewards of functions."""
        with self._writing() as db:
            db.executemany("INSERT OR REPLACE INTO answers VALUES (?, ?)", list(rewards.items()))

    def forget_answers(self) -> None:
        """Delete the saved rewards of functions, because their code has changed."""
        with self._writing() as db:
            db.execute("DELETE FROM answers")

    # -- inside ------------------------------------------------------------------------------------

    def _copy(self, missing: Sequence[str], verdicts: dict[str, Verdict]) -> None:
        """Copy verdicts of earlier runs from the cache, at no cost."""
        assert self._cache is not None
        names = ("key", "model", "mode", "labels", "shown", "sample", "p_first")
        query = f"SELECT {', '.join((*names, *_COLUMNS))} FROM verdicts WHERE key = ? AND status != 'failed'"
        with self._reading(self._cache) as cache:
            rows = [row for key in missing if (row := cache.execute(query, (key,)).fetchone()) is not None]
        if not rows:
            return
        at = len(names) + _COLUMNS.index("cost")
        with self._writing() as db:
            for row in rows:
                free = (*row[:at], 0.0, *row[at + 1 :])
                db.execute(_INSERT, (*free[: len(names)], "cache", *free[len(names) :]))
                verdict = _verdict(db, row[0])
                assert verdict is not None
                verdicts[row[0]] = verdict

    @contextmanager
    def _reading(self, db: sqlite3.Connection | None = None) -> Iterator[sqlite3.Connection]:
        with self._lock, _explained(self.path, "read"):
            yield db or self._db

    @contextmanager
    def _writing(self, db: sqlite3.Connection | None = None) -> Iterator[sqlite3.Connection]:
        with self._lock, _explained(self.path, "written"), _transaction(db or self._db) as open_db:
            yield open_db


@contextmanager
def _transaction(db: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield db
        db.execute("COMMIT")
    finally:
        if db.in_transaction:
            db.execute("ROLLBACK")


def _opened(path: Path | str) -> sqlite3.Connection:
    with _explained(path, "opened"):
        # Another run may lock the shared file for a moment, hence the timeout.
        db = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
        db.execute("PRAGMA journal_mode = DELETE")
        db.execute("PRAGMA synchronous = EXTRA")
        db.executescript(_TABLES)
    return db


@contextmanager
def _explained(path: Path | str, done: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise RunError(f"the verdicts in {str(path)!r} cannot be {done}: {error}") from error


def _settle(db: sqlite3.Connection, request: int, amount: Amount) -> None:
    db.execute(
        "UPDATE requests SET done = CURRENT_TIMESTAMP, tokens = ?, cost = ? WHERE id = ?",
        (amount.tokens, amount.cost, request),
    )


def _row(question: Question, key: str, model: str, verdict: Verdict) -> tuple[object, ...]:
    pair = question.template.mode == "pairwise" and verdict.probabilities is not None
    values = asdict(verdict) | {"probabilities": json.dumps(verdict.probabilities)}
    shown = int(len(question.texts) == 2 and question.texts[0] > question.texts[1])  # which of the two orders
    return (
        *(key, model, question.template.mode, json.dumps(question.labels), shown, question.repeat),
        *(verdict.probabilities[0] if pair and verdict.probabilities else None, "asked"),
        *(values[name] for name in _COLUMNS),
    )


def _verdict(db: sqlite3.Connection, key: str) -> Verdict | None:
    query = f"SELECT {', '.join(_COLUMNS)} FROM verdicts WHERE key = ? AND status != 'failed'"
    row = db.execute(query, (key,)).fetchone()
    if row is None:
        return None
    verdict = Verdict(**dict(zip(_COLUMNS, row, strict=True)))
    probabilities = json.loads(str(verdict.probabilities))
    said = verdict.argmax_is_label
    return replace(
        verdict,
        probabilities=None if probabilities is None else tuple(probabilities),
        argmax_is_label=None if said is None else bool(said),
    )
