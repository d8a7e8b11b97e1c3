"""The journal of a run: one SQLite file that stores every costly result as soon as it exists.

The journal is the run's `Memory`: a resumed run, or a run that needs the same result again, reads it from
here. Keys contain everything that a result depends on. So a resumed method can start from its beginning
without repeating costly work, and needs no code for resuming.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from palate.errors import AGAIN, RunError
from palate.memory import Logps, Purpose, content_key, group_key, key_of
from palate.types import Completion, Content, Group, Prompt

__all__ = ["FORMAT", "Journal", "Reward", "content_key", "group_key", "key_of"]

Reward = tuple[str, float | None, Mapping[str, float | None]]
"""Content key of a completion, its reward, and the reward's parts by name."""

FORMAT = 2
"""Version of the file format; opening a journal of another format is an error."""

_TABLES = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE prompts (id TEXT PRIMARY KEY, content TEXT NOT NULL);
CREATE TABLE chunks (
    key TEXT PRIMARY KEY, purpose TEXT NOT NULL, version INTEGER NOT NULL, place TEXT NOT NULL,
    written TEXT NOT NULL
);
CREATE TABLE completions (
    chunk TEXT NOT NULL, prompt INTEGER NOT NULL, sample INTEGER NOT NULL,
    prompt_id TEXT NOT NULL, content TEXT NOT NULL, group_content TEXT NOT NULL,
    text TEXT NOT NULL, finish TEXT NOT NULL, version INTEGER,
    token_ids BLOB NOT NULL, logps BLOB, sampling_logps BLOB,
    PRIMARY KEY (chunk, prompt, sample)
) WITHOUT ROWID;
CREATE INDEX completions_by_content ON completions (content);
CREATE TABLE rewards (
    key TEXT NOT NULL, sample INTEGER NOT NULL, content TEXT NOT NULL, group_content TEXT NOT NULL,
    reward REAL, parts TEXT NOT NULL,
    PRIMARY KEY (key, sample)
) WITHOUT ROWID;
CREATE INDEX rewards_by_content ON rewards (content);
CREATE INDEX rewards_by_group ON rewards (group_content, sample);
CREATE TABLE logps (key TEXT PRIMARY KEY, version INTEGER NOT NULL, logps BLOB NOT NULL);
CREATE TABLE metrics (id INTEGER PRIMARY KEY, key TEXT UNIQUE, row TEXT NOT NULL);
"""


class Journal:
    """Samples, annotations and measurements of a run.

    Every `keep` is one transaction, which is on disk when the method returns. A journal is not safe for
    several threads or processes; the run's lock excludes other processes.

    Attributes:
        place: position of the run, such as `step 12`; stored with each sample.

    Args:
        path: the file, created if missing. `:memory:` stores nothing on disk.
        check: read the whole file to find damage, which takes seconds per GB.

    Raises:
        RunError: the file is damaged, has another format, or cannot be written. All methods raise this too.
    """

    def __init__(self, path: Path | str, *, check: bool = True) -> None:
        self.path = path
        self.place = ""
        with self._explained("opened"):
            self._db = sqlite3.connect(path, isolation_level=None)
            # Every commit waits for the disk. A write-ahead log is off, since it needs shared memory, which
            # network disks lack.
            self._db.execute("PRAGMA journal_mode = DELETE")
            self._db.execute("PRAGMA synchronous = EXTRA")
            verdict = self._db.execute("PRAGMA quick_check(1)").fetchone()[0] if check else "ok"
            if verdict != "ok":
                raise sqlite3.DatabaseError(verdict)
            if not self._db.execute("SELECT 1 FROM sqlite_master").fetchone():
                self._db.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {FORMAT}; COMMIT;")
            (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version != FORMAT:
            self.close()
            raise RunError(
                f"journal {str(path)!r} has format {version}, expected {FORMAT}; resume the run with "
                "the version of Palate that wrote it, or start over with --overwrite"
            )

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # -- completions -------------------------------------------------------------------------------

    def completions(self, key: str) -> list[tuple[Completion, ...]] | None:
        """Return the chunk of a key, the completions of each of its prompts; None if it is not known."""
        with self._explained("read"):
            rows = self._db.execute(
                "SELECT prompt, text, token_ids, finish, version, logps, sampling_logps FROM completions"
                " WHERE chunk = ? ORDER BY prompt, sample",
                (key,),
            ).fetchall()
        groups: dict[int, list[Completion]] = {}
        for prompt, text, ids, finish, version, logps, sampling in rows:
            completion = Completion(text, _ints(ids), finish, version, _floats(logps), _floats(sampling))
            groups.setdefault(prompt, []).append(completion)
        return [tuple(completions) for completions in groups.values()] or None

    def keep_completions(
        self,
        key: str,
        version: int,
        prompts: Sequence[Prompt],
        completions: Sequence[Sequence[Completion]],
        *,
        purpose: Purpose = "completion",
    ) -> None:
        """Keep a chunk that one version of a policy has sampled."""
        rows = [
            (
                *(key, i, j, prompt.id, content_key(prompt, c), group_key(Group(prompt, tuple(own)))),
                *(c.text, c.finish, c.policy_version),
                *(_blob(c.token_ids, np.int32), _blob(c.logps, np.float32)),
                _blob(c.sampling_logps, np.float32),
            )
            for i, (prompt, own) in enumerate(zip(prompts, completions, strict=True))
            for j, c in enumerate(own)
        ]
        with self._transaction():
            self._db.execute(
                "INSERT INTO chunks VALUES (?, ?, ?, ?, datetime('now'))",
                (key, purpose, version, self.place),
            )
            self._db.executemany(
                "INSERT OR IGNORE INTO prompts VALUES (?, ?)",
                [(p.id, json.dumps(p.content, ensure_ascii=False)) for p in prompts],
            )
            marks = ", ".join("?" * len(rows[0]))
            self._db.executemany(f"INSERT INTO completions VALUES ({marks})", rows)

    # -- rewards -----------------------------------------------------------------------------------

    def rewards(self, key: str) -> list[tuple[float | None, Mapping[str, float | None]]] | None:
        """Return reward and parts of each completion of an annotated group; None if it is not known."""
        with self._explained("read"):
            rows = self._db.execute(
                "SELECT reward, parts FROM rewards WHERE key = ? ORDER BY sample", (key,)
            ).fetchall()
        return [(reward, json.loads(parts)) for reward, parts in rows] or None

    def keep_rewards(self, annotated: Sequence[tuple[str, str, Sequence[Reward]]]) -> None:
        """Keep annotations of groups: key, content key of the group, and rewards of its completions."""
        with self._transaction():
            self._db.executemany(
                "INSERT OR REPLACE INTO rewards VALUES (?, ?, ?, ?, ?, ?)",
                [
                    (key, j, content, group, reward, json.dumps(parts))
                    for key, group, rewards in annotated
                    for j, (content, reward, parts) in enumerate(rewards)
                ],
            )

    @contextmanager
    def at(self, place: str) -> Iterator[None]:
        """Note another place of what is kept meanwhile."""
        before, self.place = self.place, place
        try:
            yield
        finally:
            self.place = before

    def forget_unusable(self) -> None:
        """Forget the rewards of groups in which one is missing, so that they are asked for again.

        Saved verdicts stay, so only questions that failed in transport are sent again.
        """
        with self._transaction():
            self._db.execute(
                "DELETE FROM rewards WHERE key IN (SELECT key FROM rewards WHERE reward IS NULL)"
            )

    # -- log-probabilities -------------------------------------------------------------------------

    def logps(self, keys: Sequence[str]) -> list[Logps] | None:
        """Return the token log-probabilities of each key, float32; None unless all keys are known."""
        with self._explained("read"):
            rows = [self._db.execute("SELECT logps FROM logps WHERE key = ?", (k,)).fetchone() for k in keys]
        return None if None in rows else [np.frombuffer(row[0], np.float32) for row in rows]

    def keep_logps(self, version: int, logps: Mapping[str, Logps]) -> None:
        """Keep token log-probabilities under one version of a policy; known keys stay as they are.

        The last bits of a row depend on the rows of its batch, and a resumed run must get the same numbers.
        """
        with self._transaction():
            self._db.executemany(
                "INSERT OR IGNORE INTO logps VALUES (?, ?, ?)",
                [(key, version, values.astype(np.float32).tobytes()) for key, values in logps.items()],
            )

    # -- metrics -----------------------------------------------------------------------------------

    def add_metrics(self, row: Mapping[str, Any], *, key: str | None = None) -> None:
        """Append a row of metrics; `metrics_of` finds a row by its key."""
        with self._transaction():
            self._db.execute("INSERT INTO metrics (key, row) VALUES (?, ?)", (key, json.dumps(row)))

    def metrics(self) -> list[dict[str, Any]]:
        """Return all rows of metrics, in order."""
        with self._explained("read"):
            rows = self._db.execute("SELECT row FROM metrics ORDER BY id").fetchall()
        return [json.loads(row) for (row,) in rows]

    def count_metrics(self) -> int:
        """Return the number of rows of metrics."""
        with self._explained("read"):
            (count,) = self._db.execute("SELECT count(*) FROM metrics").fetchone()
        return int(count)

    def metrics_of(self, key: str) -> dict[str, Any] | None:
        """Return the row of metrics of a key; None if it is not known."""
        with self._explained("read"):
            row = self._db.execute("SELECT row FROM metrics WHERE key = ?", (key,)).fetchone()
        return None if row is None else dict(json.loads(row[0]))

    def rewind(self, metrics: int, version: int | None) -> None:
        """Return to an earlier state: remove later metrics, and results of later policy versions.

        Args:
            metrics: number of rows to keep.
            version: remove completions and log-probabilities of later versions of the policy, because a
                resumed run will not reproduce them bit for bit; None keeps them, because it will.
        """
        with self._transaction():
            self._db.execute(
                "DELETE FROM metrics WHERE id NOT IN (SELECT id FROM metrics ORDER BY id LIMIT ?)", (metrics,)
            )
            if version is not None:
                self._db.execute(
                    "DELETE FROM completions WHERE chunk IN (SELECT key FROM chunks WHERE version > ?)",
                    (version,),
                )
                self._db.execute("DELETE FROM chunks WHERE version > ?", (version,))
                self._db.execute("DELETE FROM logps WHERE version > ?", (version,))

    # -- facts -------------------------------------------------------------------------------------

    def fact(self, name: str) -> str | None:
        """Return a fact of the run, such as the hash of its data; None if it is not known."""
        with self._explained("read"):
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if row is None else str(row[0])

    def keep_fact(self, name: str, value: str) -> None:
        """Set a fact."""
        with self._transaction():
            self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def is_empty(self) -> bool:
        """Return whether the journal has no samples, annotations, log-probabilities and metrics."""
        with self._explained("read"):
            there = {name for (name,) in self._db.execute("SELECT name FROM sqlite_master")}
            # The last two are the ledger's of judges, which have cost something.
            tables = there & {"chunks", "rewards", "logps", "metrics", "requests", "answers"}
            return not any(self._db.execute(f"SELECT 1 FROM {t} LIMIT 1").fetchone() for t in tables)

    def table(self, purpose: Purpose = "completion") -> Iterator[dict[str, Any]]:
        """Yield every completion of a purpose with its prompt and its reward, in the order of sampling."""
        with self._explained("read"):
            rows = self._db.cursor().execute(
                "SELECT k.place, p.content, c.text, c.finish, c.version, length(c.token_ids) / 4,"
                # The reward within the sampled group; else within another group.
                " coalesce((SELECT reward FROM rewards r"
                "   WHERE r.group_content = c.group_content AND r.sample = c.sample LIMIT 1),"
                "  (SELECT reward FROM rewards r WHERE r.content = c.content LIMIT 1))"
                " FROM chunks k JOIN completions c ON c.chunk = k.key JOIN prompts p ON p.id = c.prompt_id"
                " WHERE k.purpose = ? ORDER BY k.rowid, c.prompt, c.sample",
                (purpose,),
            )
            for place, prompt, text, finish, version, tokens, reward in rows:  # more than memory holds
                yield {
                    "prompt": json.loads(prompt),
                    "completion": text,
                    "reward": reward,
                    "finish": finish,
                    "tokens": tokens,
                    "policy_version": version,
                    "place": place,
                }

    def prompts(self, purpose: Purpose = "completion") -> Iterator[Content]:
        """Yield the content of each prompt that has a completion of a purpose, once."""
        with self._explained("read"):
            rows = self._db.cursor().execute(
                "SELECT content FROM prompts WHERE id IN"
                " (SELECT c.prompt_id FROM chunks k JOIN completions c ON c.chunk = k.key"
                "  WHERE k.purpose = ?)",
                (purpose,),
            )
            for (content,) in rows:
                yield json.loads(content)

    def has_completions(self, purpose: Purpose = "completion") -> bool:
        """Return whether there are completions of a purpose."""
        with self._explained("read"):
            rows = self._db.execute(
                "SELECT 1 FROM chunks k JOIN completions c ON c.chunk = k.key WHERE k.purpose = ? LIMIT 1",
                (purpose,),
            )
            return rows.fetchone() is not None

    # -- inside ------------------------------------------------------------------------------------

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._explained("written"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            finally:
                if self._db.in_transaction:
                    self._db.execute("ROLLBACK")

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            reason = " ".join(str(error).split())
            raise RunError(
                f"journal {str(self.path)!r} cannot be {done}: {reason}; {_advice(error)}"
            ) from error


def _advice(error: sqlite3.Error) -> str:
    name = getattr(error, "sqlite_errorname", "")
    if name.startswith("SQLITE_FULL"):
        return f"free some space and {AGAIN}: earlier results are safe"
    if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or name in ("SQLITE_ERROR", ""):
        return "it is damaged: restore a good copy, or start over with --overwrite"
    if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_CONSTRAINT")):
        return f"another process is writing to it: wait until that has ended, then {AGAIN}"
    return f"make its directory writable, then {AGAIN}"


def _blob(values: Sequence[float] | None, kind: type[np.generic]) -> bytes | None:
    return None if values is None else np.asarray(values, kind).tobytes()


def _ints(blob: bytes) -> tuple[int, ...]:
    return tuple(np.frombuffer(blob, np.int32).tolist())


def _floats(blob: bytes | None) -> tuple[float, ...] | None:
    return None if blob is None else tuple(np.frombuffer(blob, np.float32).tolist())
