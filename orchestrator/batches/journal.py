"""The journal of a submission: what was sent and what came back, so that it can go on after any end.

out.jsonl               results, one line a request
out.jsonl.errors.jsonl  lines that were left out
out.jsonl.batch         the journal (SQLite; -wal and -shm beside it while in use)

The files are appended to first and the journal is committed then; what is in them beyond the journal is cut off when it
is opened again. So each request is in the output once, whenever the process is killed.
"""

from __future__ import annotations

import json
import os
import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from orchestrator.batches.append_file import AppendFile, AppendFileError
from orchestrator.batches.events import request_id
from orchestrator.batches.lines import (
    CANCELLED,
    BadLine,
    OutputLineError,
    Request,
    duplicate,
    error_output,
    parse_output,
)
from orchestrator.batches.reader import NOTHING_READ, Chunk, Mark
from orchestrator.batches.transactions import transaction

VERSION = 1  # PRAGMA user_version
APPLICATION_ID = 0x53744261  # "StBa"
SUFFIX = ".batch"
CACHE_KIB = 8192
CANCELLED_AT_ONCE = 1000  # requests

_SCHEMA = f"""
BEGIN;
CREATE TABLE state (json TEXT NOT NULL);  -- one row
CREATE TABLE request (custom_id TEXT PRIMARY KEY, line INTEGER NOT NULL, done INTEGER NOT NULL) WITHOUT ROWID;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {VERSION};
COMMIT;
"""


class JournalError(Exception):
    """The journal, or a file beside it, cannot be used; the text says why and what to do."""


@dataclass(frozen=True, slots=True)
class State:
    """A batch and how far it is. Counts are of requests, `bad` of lines that were left out."""

    batch: str
    input: str  # absolute path, or -
    input_bytes: int | None  # None: no file, such as standard input
    output: str | None
    broker: str
    results: str | None
    model: str | None
    created_s: float  # Unix time
    offset: int = 0  # sent up to here
    line: int = 0
    digest: str = NOTHING_READ
    all_sent: bool = False
    cancelling: bool = False
    sent: int = 0
    bad: int = 0
    after: int = 0  # the results service's number of the last result that came
    completed: int = 0
    failed: int = 0
    cancelled: int = 0
    output_bytes: int = 0
    errors_bytes: int = 0

    @property
    def mark(self) -> Mark:
        return Mark(self.offset, self.line, self.digest)

    @property
    def finished(self) -> int:
        return self.completed + self.failed + self.cancelled

    @property
    def is_over(self) -> bool:
        """Nothing is left to be sent or to come."""
        return (self.all_sent or self.cancelling) and self.finished >= self.sent

    @property
    def phase(self) -> str:
        if self.is_over:
            return "cancelled" if self.cancelling else "completed"
        if self.cancelling:
            return "cancelling"
        return "in progress" if self.all_sent else "sending"


def errors_path(journal: Path) -> Path:
    return journal.with_name(journal.name.removesuffix(SUFFIX) + ".errors.jsonl")


class Journal:
    """For one process and one thread at a time. Its calls raise JournalError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state = read_state(path)  # refuses what is no journal of ours before anything is written
        with self._readable():
            self._db = _connect(path)
            try:
                output = self.state.output
                self._output = AppendFile(Path(output), self.state.output_bytes) if output else None
                self._errors: AppendFile | None = None
                if self.state.errors_bytes or errors_path(path).exists():
                    self._errors = AppendFile(errors_path(path), self.state.errors_bytes)
            except BaseException:
                self._db.close()
                raise

    @classmethod
    def create(cls, path: Path, state: State) -> Self:
        """Raises JournalError if there is one already, or an output or errors to overwrite."""
        for taken in (path, errors_path(path), *([Path(state.output)] if state.output else [])):
            if os.path.lexists(taken):
                raise JournalError(
                    f"{taken} exists already; choose another output, remove it, or go on with a batch by "
                    "`stagecraft batch resume`"
                )
        draft = path.with_name(f"{path.name}-new")
        with _readable(path):
            draft.unlink(missing_ok=True)
            with closing(sqlite3.connect(draft, isolation_level=None)) as db:
                db.executescript(_SCHEMA)
                db.execute("INSERT INTO state VALUES (?)", (json.dumps(asdict(state)),))
            draft.replace(path)
        return cls(path)

    def claim(self, requests: Sequence[Request]) -> list[BadLine]:
        """Notes the custom_ids; gives the requests whose custom_id another line has. The same line may come again."""
        bad = []
        with self._transaction():
            for request in requests:
                row = (request.custom_id, request.number)
                if self._db.execute("INSERT INTO request VALUES (?, ?, 0) ON CONFLICT DO NOTHING", row).rowcount:
                    continue
                (line,) = self._db.execute("SELECT line FROM request WHERE custom_id = ?", row[:1]).fetchone()
                if line != request.number:
                    bad.append(duplicate(request, line))
        return bad

    def note_sent(self, chunk: Chunk, accepted: int, bad: Sequence[BadLine], refused: Iterable[str] = ()) -> None:
        """The broker has all of the chunk but `bad` lines; those it refused itself are `refused`, by custom_id."""
        with self._transaction():
            self._db.executemany("UPDATE request SET done = 1 WHERE custom_id = ?", [(one,) for one in refused])
            if bad:
                self._errors = self._errors or AppendFile(errors_path(self.path), 0)
                self._errors.append(b"".join(line.to_json() + b"\n" for line in bad))
            self._save(
                replace(
                    self.state,
                    offset=chunk.end.offset,
                    line=chunk.end.line,
                    digest=chunk.end.digest,
                    model=chunk.model,
                    sent=self.state.sent + accepted,
                    bad=self.state.bad + len(bad),
                    errors_bytes=self._errors.size_bytes if self._errors else 0,
                )
            )

    def note_all_sent(self) -> None:
        with self._transaction():
            self._save(replace(self.state, all_sent=True))

    def note_cancelling(self) -> None:
        with self._transaction():
            self._save(replace(self.state, cancelling=True))

    def note_addresses(self, broker: str, results: str | None) -> None:
        with self._transaction():
            self._save(replace(self.state, broker=broker, results=results))

    def receive(self, lines: Iterable[bytes], after: int) -> list[BadLine]:
        """Appends output lines, the first for each open request of this batch; `after` is the number of the last.

        Gives the input lines whose requests failed."""
        with self._transaction():
            return self._append(lines, after)

    def cancel_open(self) -> None:
        """Gives every request without a result the line of a cancelled one."""
        message = "This request was not answered before the batch was cancelled."
        while True:
            rows = self._db.execute("SELECT custom_id FROM request WHERE done = 0 LIMIT ?", (CANCELLED_AT_ONCE,))
            if not (open_ids := [custom_id for (custom_id,) in rows.fetchall()]):
                return
            ids = [(request_id(self.state.batch, custom_id), custom_id) for custom_id in open_ids]
            self.receive([error_output(id, custom_id, CANCELLED, message) for id, custom_id in ids], self.state.after)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()
        for file in (self._output, self._errors):
            if file is not None:
                file.close()

    def _append(self, lines: Iterable[bytes], after: int) -> list[BadLine]:
        counts = {"completed": 0, "failed": 0, "cancelled": 0}
        kept, failed = [], []
        for line in lines:
            outcome = parse_output(line)
            update = "UPDATE request SET done = 1 WHERE custom_id = ? AND done = 0"
            if self._db.execute(update, (outcome.custom_id,)).rowcount:
                kept.append(line + b"\n")
                counts[outcome.kind] += 1
                if outcome.kind == "failed":
                    failed.append(
                        BadLine(self._line_of(outcome.custom_id), outcome.custom_id, "failed", outcome.reason)
                    )
        if self._output and kept:
            self._output.append(b"".join(kept))
        changed = {name: getattr(self.state, name) + count for name, count in counts.items()}
        size_bytes = self._output.size_bytes if self._output else 0
        self._save(replace(self.state, after=after, output_bytes=size_bytes, **changed))
        return failed

    def _line_of(self, custom_id: str) -> int:
        (line,) = self._db.execute("SELECT line FROM request WHERE custom_id = ?", (custom_id,)).fetchone()
        return int(line)

    def _save(self, state: State) -> None:
        self._db.execute("UPDATE state SET json = ?", (json.dumps(asdict(state)),))
        self._unsaved = state

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """After an error the journal is to be closed: the next opening cuts off what was appended meanwhile."""
        self._unsaved = self.state
        with self._readable(), transaction(self._db):
            yield
        self.state = self._unsaved

    @contextmanager
    def _readable(self) -> Iterator[None]:
        with _readable(self.path):
            yield


def read_state(path: Path) -> State:
    """What the journal says now, also while another process writes it. Raises JournalError; changes nothing."""
    if not path.is_file():
        raise JournalError(f"there is no journal {path}")
    with _readable(path), closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
        application_id, version = (
            db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
        )
        if application_id != APPLICATION_ID:
            raise JournalError(f"{path} is no journal of a batch")
        if version != VERSION:
            raise JournalError(
                f"{path} has version {version}, this program knows version {VERSION}: use the program that wrote it; "
                "the file is unchanged"
            )
        (text,) = db.execute("SELECT json FROM state").fetchone()
    return State(**json.loads(text))


def _connect(path: Path) -> sqlite3.Connection:
    db = sqlite3.connect(path, isolation_level=None, timeout=5.0)
    db.execute("PRAGMA journal_mode = WAL")
    # a power cut may take the last commits with it: then these lines are sent and fetched again, which is harmless
    db.execute("PRAGMA synchronous = NORMAL")
    db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
    return db


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """What goes wrong with the journal or the files beside it, in words for people."""
    try:
        yield
    except sqlite3.Error as error:
        raise JournalError(f"the journal {path} cannot be used: {error}; check the disk, then resume") from None
    except AppendFileError as error:
        raise JournalError(
            f"{error}; `stagecraft batch results` writes all results to another file, from the results service"
        ) from None
    except OutputLineError as error:
        raise JournalError(f"the results service sent what is no result: {error}; check --results") from None
    except OSError as error:
        raise JournalError(f"cannot write {error.filename or path}: {error.strerror or error}; then resume") from None
