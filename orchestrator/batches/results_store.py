"""The file of the results service: one SQLite database in which an accepted result survives `kill -9`.

A rollback journal instead of a write-ahead log: while one revision takes over from another, two processes may have the
file open, perhaps on a network volume, which a write-ahead log does not allow.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from knative.eventing.store_errors import StoreError, readable
from orchestrator.batches.lines import Kind
from orchestrator.batches.transactions import transaction

VERSION = 1  # PRAGMA user_version
APPLICATION_ID = 0x53745265  # "StRe"
CACHE_KIB = 16384
PAGE_BYTES = 8 << 20  # of output lines given at once
DELETED_AT_ONCE = 1000

_SCHEMA = f"""
BEGIN EXCLUSIVE;
CREATE TABLE batch (
    name TEXT PRIMARY KEY,
    completed INTEGER NOT NULL DEFAULT 0,
    failed INTEGER NOT NULL DEFAULT 0,
    cancelled INTEGER NOT NULL DEFAULT 0,
    dead_letters INTEGER NOT NULL DEFAULT 0,
    cancelling INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE result (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- never used again, as readers remember how far they are
    batch TEXT NOT NULL,
    custom_id TEXT NOT NULL,
    line BLOB NOT NULL
);
CREATE UNIQUE INDEX result_request ON result (batch, custom_id);
CREATE INDEX result_order ON result (batch, number);
CREATE TABLE dead_letter (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    batch TEXT NOT NULL,
    key TEXT NOT NULL,  -- source and id of the event
    facts TEXT NOT NULL,  -- JSON object
    data BLOB NOT NULL
);
CREATE UNIQUE INDEX dead_letter_key ON dead_letter (batch, key);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
COMMIT;
"""


@dataclass(frozen=True, slots=True)
class Result:
    """An output line on its way in."""

    batch: str
    custom_id: str
    kind: Kind
    line: bytes


@dataclass(frozen=True, slots=True)
class Cancellation:
    batch: str


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """An event that the broker gave up. `key` names it, `facts` is told to people."""

    batch: str
    key: str
    facts: Mapping[str, Any]
    data: bytes


Item = Result | Cancellation | DeadLetter


class ResultsStore:
    """For one thread. A call that was not carried out raises StoreError, and StoreFull for want of room on the disk."""

    def __init__(self, path: Path) -> None:
        """Opens or creates. A file of another program or of a version that we do not know is refused and left alone."""
        self.path = path
        with self._readable():
            self._db = sqlite3.connect(path, isolation_level=None, timeout=10.0, check_same_thread=False)
            try:
                self._prepare()
            except BaseException:
                self._db.close()
                raise

    def add(self, items: Sequence[Item]) -> list[bool]:
        """Whether each was new; the first result of a request stays. All are durable when it returns, or none."""
        with self._transaction():
            return [self._add(item) for item in items]

    def batches(self) -> list[dict[str, Any]]:
        with self._readable():
            return [_counts(row) for row in self._db.execute("SELECT * FROM batch ORDER BY name").fetchall()]

    def counts(self, batch: str) -> dict[str, Any] | None:
        """None when nothing of the batch has come yet."""
        with self._readable():
            row = self._db.execute("SELECT * FROM batch WHERE name = ?", (batch,)).fetchone()
        return _counts(row) if row else None

    def results(self, batch: str, after: int, limit: int) -> tuple[list[bytes], int]:
        """Lines that came after number `after`, and the number of the last of them; fewer where they are long."""
        query = "SELECT number, line FROM result WHERE batch = ? AND number > ? ORDER BY number LIMIT ?"
        lines: list[bytes] = []
        size_bytes, last = 0, after
        with self._readable():
            for number, line in (rows := self._db.execute(query, (batch, after, limit))):
                lines.append(line)
                last, size_bytes = number, size_bytes + len(line)
                if size_bytes >= PAGE_BYTES:
                    rows.close()  # an unfinished SELECT would keep others from writing
                    break
        return lines, last

    def dead_letters(self, batch: str, after: int, limit: int) -> tuple[list[bytes], int]:
        """As `results`: JSON objects, which say what it was and why it was given up."""
        query = "SELECT number, facts FROM dead_letter WHERE batch = ? AND number > ? ORDER BY number LIMIT ?"
        with self._readable():
            rows = self._db.execute(query, (batch, after, limit)).fetchall()
        return [facts.encode() for _, facts in rows], rows[-1][0] if rows else after

    def delete_some(self, batch: str) -> bool:
        """Removes a part of what there is of the batch; False when nothing is left. Bounded, as others wait."""
        removed = 0
        with self._transaction():
            for table in ("result", "dead_letter"):
                part = f"SELECT number FROM {table} WHERE batch = ? LIMIT {DELETED_AT_ONCE}"
                removed += self._db.execute(f"DELETE FROM {table} WHERE number IN ({part})", (batch,)).rowcount
            if not removed:
                self._db.execute("DELETE FROM batch WHERE name = ?", (batch,))
        return removed > 0

    def close(self) -> None:
        self._db.close()

    def _add(self, item: Item) -> bool:
        self._db.execute("INSERT INTO batch (name) VALUES (?) ON CONFLICT DO NOTHING", (item.batch,))
        if isinstance(item, Cancellation):
            return self._count(item.batch, "cancelling = 1", "cancelling = 0")
        if isinstance(item, Result):
            insert = "INSERT INTO result (batch, custom_id, line) VALUES (?, ?, ?) ON CONFLICT DO NOTHING"
            is_new = self._db.execute(insert, (item.batch, item.custom_id, item.line)).rowcount > 0
            return is_new and self._count(item.batch, f"{item.kind} = {item.kind} + 1")
        insert = "INSERT INTO dead_letter (batch, key, facts, data) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING"
        row = (item.batch, item.key, json.dumps(item.facts), item.data)
        is_new = self._db.execute(insert, row).rowcount > 0
        return is_new and self._count(item.batch, "dead_letters = dead_letters + 1")

    def _count(self, batch: str, change: str, condition: str = "1") -> bool:
        return self._db.execute(f"UPDATE batch SET {change} WHERE name = ? AND {condition}", (batch,)).rowcount > 0

    def _prepare(self) -> None:
        application_id, version = (
            self._db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if tables and application_id != APPLICATION_ID:
            raise StoreError(f"{self.path} is the database of another program: name another file in RESULTS_FILE")
        if tables and version != VERSION:
            raise StoreError(
                f"{self.path} has version {version}, this program knows version {VERSION}: use the program that wrote "
                "it, or name another file in RESULTS_FILE; the file is unchanged"
            )
        self._db.execute("PRAGMA journal_mode = TRUNCATE")
        self._db.execute("PRAGMA synchronous = FULL")
        self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        if not tables:
            self._create()

    def _create(self) -> None:
        try:
            self._db.executescript(_SCHEMA)
        except sqlite3.Error:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if not tables:  # else another process was faster
                raise

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        with self._readable(), transaction(self._db):
            yield

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise readable(self.path, error) from error


def _counts(row: Sequence[Any]) -> dict[str, Any]:
    name, completed, failed, cancelled, dead_letters, cancelling = row
    return {
        "batch": name,
        "completed": completed,
        "failed": failed,
        "cancelled": cancelled,
        "dead_letters": dead_letters,
        "cancelling": bool(cancelling),
    }
