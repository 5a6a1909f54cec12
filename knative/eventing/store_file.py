"""The file of the store: created whole, refused when it is not ours, used by one process at a time.

broker.db           events and deliveries (SQLite; page cache and write-ahead log are bounded)
broker.db-wal       write-ahead log: present while in use, and after a kill
broker.db-lock      locked while in use; stays, since removing a lock file lets two processes in
broker.db-reserve   room set aside so that deliveries can be settled on a disk that others have filled
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from typing import IO

from knative.eventing.store_errors import StoreError, StoreFull, readable

VERSION = 1  # PRAGMA user_version
APPLICATION_ID = 0x53744576  # "StEv": a database of another program is not taken over
CHECKPOINT_PAGES = 1000  # 4 MB: the log is folded into the file and begun anew
LOG_BYTES_KEPT = 8 << 20  # a log that one large transaction has stretched is cut back to this
RESERVE_BYTES = 16 << 20  # a log of CHECKPOINT_PAGES, its largest transaction, and the file's growth by both

SCHEMA = f"""
BEGIN;
CREATE TABLE event (
    id INTEGER PRIMARY KEY,
    broker TEXT NOT NULL,
    key TEXT NOT NULL,
    attributes TEXT NOT NULL,  -- JSON object
    data BLOB,
    ttl INTEGER NOT NULL,
    accepted_s REAL NOT NULL   -- Unix time, as due_s
);
CREATE TABLE delivery (
    event INTEGER NOT NULL,
    target TEXT NOT NULL,
    due_s REAL NOT NULL,
    attempt INTEGER NOT NULL,  -- the next one; the first is 1
    error TEXT NOT NULL,       -- of the last one
    PRIMARY KEY (event, target)
) WITHOUT ROWID;
CREATE INDEX delivery_due ON delivery (target, due_s, event);
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
COMMIT;
PRAGMA journal_mode = WAL;
"""


class StoreFile:
    """An opened store: `db` is its only connection, to be used by the thread that opened it.

    Raises StoreError, and has then changed nothing, when the file is another program's, unreadable, of another version
    or in use."""

    def __init__(self, path: Path, synchronous: str, min_free_bytes: int) -> None:
        self.path = path
        self._min_free_bytes = min_free_bytes
        if path.exists() and not path.is_file():
            raise StoreError(f"{path} is no file: give the path of a file, which is created if there is none")
        try:
            self._lock = _lock(path)
            try:
                if path.exists() and path.stat().st_size:
                    _check(path)
                else:
                    _create(path)
                self.db = _connect(path, synchronous)
            except BaseException:
                self._lock.close()
                raise
        except (sqlite3.Error, OSError) as error:
            raise readable(path, error) from None
        self._reserve = Path(f"{path}-reserve")
        self._reserve_held = self._reserve.exists()
        with suppress(StoreFull):  # a full disk must not keep us from delivering what is there
            self.check_room()

    def check_room(self) -> None:
        """Raises StoreFull when the disk has less than `min_free_bytes` left. Renews the reserve when there is room."""
        free_bytes = self._free_bytes()
        if free_bytes < self._min_free_bytes:
            raise StoreFull(
                f"the disk of {self.path} has {free_bytes >> 20} MiB left, below the {self._min_free_bytes >> 20} MiB "
                "at which intake stops: make room; what was accepted is kept and still delivered"
            )
        if not self._reserve_held and free_bytes >= self._min_free_bytes + RESERVE_BYTES:
            self._reserve_held = _set_aside(self._reserve)

    def is_short_of_room(self) -> bool:
        """Whether intake would be refused."""
        return self._free_bytes() < self._min_free_bytes

    def spend_reserve(self) -> bool:
        """Gives the reserve back to the disk; False if it is spent already."""
        held, self._reserve_held = self._reserve_held, False
        self._reserve.unlink(missing_ok=True)
        return held

    def close(self) -> None:
        self.db.close()
        self._lock.close()

    def _free_bytes(self) -> int:
        disk = os.statvfs(self.path)
        return disk.f_bavail * disk.f_frsize


def _lock(path: Path) -> IO[bytes]:
    """An own file: SQLite's locks on the database vanish when any other descriptor of it is closed in this process."""
    lock = Path(f"{path}-lock").open("ab")  # noqa: SIM115  # stays open as long as the store is
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise StoreError(
            f"{path} is in use: only one process may use a store; end the other or give another path"
        ) from None
    return lock


def _check(path: Path) -> None:
    """Reads without writing: an ordinary connection would fold a log left by a kill into the file when it closes."""
    log, shared_memory = Path(f"{path}-wal"), Path(f"{path}-shm")
    has_log, had_shared_memory = log.exists() and log.stat().st_size > 0, shared_memory.exists()
    uri = f"{path.absolute().as_uri()}?mode=ro" + ("" if has_log else "&immutable=1")
    try:
        with closing(sqlite3.connect(uri, uri=True)) as db:
            _check_ours(path, db)
    except sqlite3.Error as error:
        raise StoreError(
            f"{path} cannot be read ({error}): it is no SQLite database or is damaged. It is unchanged: move it away, "
            f'or give another path; `sqlite3 {path} ".recover"` shows what can be read'
        ) from None
    finally:
        if not had_shared_memory:
            shared_memory.unlink(missing_ok=True)


def _check_ours(path: Path, db: sqlite3.Connection) -> None:
    (application_id,) = db.execute("PRAGMA application_id").fetchone()
    (version,) = db.execute("PRAGMA user_version").fetchone()
    if application_id != APPLICATION_ID:
        raise StoreError(f"{path} is the database of another program: give another path")
    if version != VERSION:
        raise StoreError(
            f"{path} has version {version}, this program reads and writes version {VERSION}: "
            "use the program that wrote it, or give another path; the file is unchanged"
        )
    for read in ("max(id) FROM event", "count(*) FROM delivery INDEXED BY delivery_due"):  # what opening will read
        db.execute(f"SELECT {read}").fetchone()


def _create(path: Path) -> None:
    """Under another name first, so that a kill never leaves half a store under `path`."""
    draft = Path(f"{path}-new")
    for leftover in (draft, Path(f"{draft}-journal"), Path(f"{draft}-wal"), Path(f"{draft}-shm")):
        leftover.unlink(missing_ok=True)
    with closing(sqlite3.connect(draft, isolation_level=None)) as db:
        db.executescript(SCHEMA)
    with draft.open("rb") as created:
        os.fsync(created.fileno())
    draft.replace(path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _connect(path: Path, synchronous: str) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=1.0)
    try:
        db.execute("PRAGMA locking_mode = EXCLUSIVE")  # keeps other SQLite programs out; the log needs no shared memory
        db.execute(f"PRAGMA synchronous = {synchronous}")
        db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        db.execute(f"PRAGMA journal_size_limit = {LOG_BYTES_KEPT}")
        db.execute("BEGIN IMMEDIATE")
        db.execute("COMMIT")
    except BaseException:
        db.close()
        raise
    return db


def _set_aside(reserve: Path) -> bool:
    try:
        with reserve.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, RESERVE_BYTES)
    except OSError:
        reserve.unlink(missing_ok=True)
        return False
    return True
