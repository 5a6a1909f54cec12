"""The thread that alone uses the file: writes that wait at the same time share one transaction (group commit).

event loop                              thread
future = submit(write)  -> queue ->     gather what waits
                                        BEGIN, the statements of each, COMMIT: one fsync for all
futures resolved        <- one call <-  only now
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from knative.eventing import store_rows
from knative.eventing.store_errors import StoreError, is_beyond_trust, is_full, readable
from knative.eventing.store_file import StoreFile
from knative.eventing.store_rows import Backlog, Changes

GROUP_JOBS_MAX = 1024
GROUP_BYTES_MAX = 4 << 20
IDLE_S = 0.2  # then the file is made smaller
FREE_PAGES_KEPT = 4096  # 16 MiB, for the next events
SHORT_PAGES_KEPT = 256  # 1 MiB, where the disk is short of room
USED_PAGES_MOVED = 2048  # 8 MiB; some 50 ms

Kind = Literal["intake", "write", "read"]
Run = Callable[[sqlite3.Connection, Changes], Any]


@dataclass(frozen=True, slots=True)
class Job:
    kind: Kind
    run: Run
    future: asyncio.Future[Any]
    size_bytes: int


class Writer:
    """`await opened`, then submit. `backlog` and `next_id` are there once it is opened."""

    backlog: Backlog
    next_id: int

    def __init__(self, path: Path, synchronous: str, min_free_bytes: int) -> None:
        self._path = path
        self._options = (synchronous, min_free_bytes)
        self._loop = asyncio.get_running_loop()
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._file: StoreFile
        self._closing = False
        self._failure: StoreError | None = None  # since which nothing is done any more
        self._settled: list[tuple[asyncio.Future[Any], Any, StoreError | None]] = []
        self.transactions = 0
        self.opened: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[None] = self._loop.create_future()
        # daemon: what is accepted is durable, so a program that forgets close() need not hang at its end
        threading.Thread(target=self._main, name=f"store {path.name}", daemon=True).start()

    def submit(self, kind: Kind, run: Run, size_bytes: int = 0) -> asyncio.Future[Any]:
        """The future has what `run` returns once that is committed; a StoreError means that nothing of it was done."""
        if self._closing:
            raise StoreError(f"the store {self._path} is closed")
        future = self._loop.create_future()
        self._jobs.put(Job(kind, run, future, size_bytes))
        return future

    def close(self) -> None:
        """Ends the thread once what was submitted is done: `await closed`."""
        if not self._closing:
            self._closing = True
            self._jobs.put(None)

    def _main(self) -> None:
        try:
            self._file = StoreFile(self._path, *self._options)
            try:
                self.backlog, self.next_id = store_rows.count(self._file.db)
            except BaseException:
                self._file.close()
                raise
        except Exception as error:
            self._settle(self.opened, None, readable(self._path, error))
            self._report()
            return
        self._settle(self.opened, None)
        self._report()
        try:
            while self._serve():
                pass
        finally:
            self._file.close()
            self._settle(self.closed, None)
            self._report()

    def _serve(self) -> bool:
        """Does what waits; False when it was the last."""
        group = self._gather()
        jobs = [job for job in group if job is not None]
        self._commit(self._with_room([job for job in jobs if job.kind != "read"]))
        self._report()
        for job in jobs:
            if job.kind == "read":
                self._read(job)
        self._report()
        return None not in group

    def _gather(self) -> list[Job | None]:
        try:
            group = [self._jobs.get(timeout=IDLE_S)]
        except queue.Empty:
            self._shrink()
            group = [self._jobs.get()]
        size_bytes = group[0].size_bytes if group[0] else 0
        with suppress(queue.Empty):
            while len(group) < GROUP_JOBS_MAX and size_bytes < GROUP_BYTES_MAX:
                job = self._jobs.get_nowait()
                group.append(job)
                size_bytes += job.size_bytes if job else 0
        return group

    def _with_room(self, jobs: list[Job]) -> list[Job]:
        """Without the intake for which the disk is too full."""
        try:
            if any(job.kind == "intake" for job in jobs):
                self._file.check_room()
        except (StoreError, OSError) as error:
            for job in jobs:
                if job.kind == "intake":
                    self._fail(job, error)
            return [job for job in jobs if job.kind != "intake"]
        return jobs

    def _commit(self, jobs: list[Job]) -> None:
        """A group that fails is halved until only the jobs that cannot be done are left to fail."""
        if not jobs:
            return
        try:
            results = self._transaction(jobs)
        except Exception as error:
            if len(jobs) > 1 and not self._failure:
                self._commit(jobs[: len(jobs) // 2])
                self._commit(jobs[len(jobs) // 2 :])
            elif jobs[0].kind != "intake" and is_full(error) and self._file.spend_reserve():
                self._commit(jobs)
            else:
                for job in jobs:
                    self._fail(job, error)
            return
        for job, result in zip(jobs, results, strict=True):
            self._settle(job.future, result)

    def _transaction(self, jobs: list[Job]) -> list[Any]:
        self._check_trust()
        db, changes = self._file.db, Changes()
        try:
            db.execute("BEGIN IMMEDIATE")
            results = [job.run(db, changes) for job in jobs]
            db.execute("COMMIT")
        except Exception as error:
            self._distrust(error)
            with suppress(sqlite3.Error):  # SQLite has rolled back by itself after some errors
                db.execute("ROLLBACK")
            raise
        self.transactions += 1
        self.backlog.apply(changes)
        return results

    def _read(self, job: Job) -> None:
        try:
            self._check_trust()
            self._settle(job.future, job.run(self._file.db, Changes()))
        except Exception as error:
            self._distrust(error)
            self._fail(job, error)

    def _shrink(self) -> None:
        """Gives the room of a backlog that is gone back to the disk. Until then, and while some is left, it is reused.

        Not by incremental_vacuum, which looks each page up in the list of free ones: 15 MB/s seen at 500 MB."""
        with suppress(sqlite3.Error, OSError):  # as on a full disk: another time
            pages, free = (
                self._file.db.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "freelist_count")
            )
            is_short = self._file.is_short_of_room()  # then what is kept for the next events would keep them out
            if free > (SHORT_PAGES_KEPT if is_short else FREE_PAGES_KEPT) and pages - free < USED_PAGES_MOVED:
                self._file.db.execute("VACUUM")
            elif not is_short:
                return
            self._file.db.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _check_trust(self) -> None:
        if self._failure:
            raise self._failure

    def _distrust(self, error: Exception) -> None:
        if is_beyond_trust(error):
            self._failure = readable(self._path, error)

    def _fail(self, job: Job, error: Exception) -> None:
        self._settle(job.future, None, readable(self._path, error))

    def _settle(self, future: asyncio.Future[Any], result: Any, error: StoreError | None = None) -> None:
        self._settled.append((future, result, error))

    def _report(self) -> None:
        """Resolves the futures settled so far, in the event loop."""
        settled, self._settled = self._settled, []
        if settled:
            with suppress(RuntimeError):  # the event loop is closed: nobody waits any more
                self._loop.call_soon_threadsafe(_resolve, settled)


def _resolve(settled: list[tuple[asyncio.Future[Any], Any, StoreError | None]]) -> None:
    for future, result, error in settled:
        if future.done():
            continue
        if error is None:
            future.set_result(result)
        else:
            future.set_exception(error)
