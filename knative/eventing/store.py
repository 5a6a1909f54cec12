"""The durable queue under the broker: one SQLite file in which an accepted event survives `kill -9`.

    accept ──> [event] ──> one delivery a target ──take──> in flight ──settle───> gone, replies come in with it
                                  ^                            ├───bury─────> gone, the dead letter comes in with it
                                  └────────── due later ───────┴───postpone

Each arrow is one transaction. Delivery is at least once: what was in flight when the process died is due again. A store
belongs to the event loop that opened it and never blocks it: all work on the file is done by one thread, with one
connection (two that write and check-point at the same time can damage a log in SQLite before 3.51.3). Times are Unix
times, since they outlive the process; if the clock is set back, what is due comes later by as much.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

from knative.eventing import store_rows
from knative.eventing.store_errors import StoreError, StoreFull
from knative.eventing.store_rows import Delivery, Event, NewEvent, Rows
from knative.eventing.store_writer import Run, Writer

__all__ = ["Delivery", "Event", "EventStore", "NewEvent", "Stats", "StoreError", "StoreFull"]

WAITING_MAX = 1024  # calls of accept and take handed to the thread; more wait for their turn
MIN_FREE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class Stats:
    """`depths` counts queued and in-flight deliveries, `transactions` those since the store was opened."""

    depths: Mapping[str, int]
    in_flight: Mapping[str, int]
    transactions: int
    file_bytes: int
    log_bytes: int


class EventStore:
    """Every call raises StoreError if it was not carried out; StoreFull if that was for want of room on the disk."""

    def __init__(self, path: Path, writer: Writer, clock: Callable[[], float]) -> None:
        self._path = path
        self._writer = writer
        self._clock = clock
        self._ids = itertools.count(writer.next_id)
        self._slots = asyncio.Semaphore(WAITING_MAX)

    @classmethod
    async def open(
        cls,
        path: Path,
        *,
        synchronous: Literal["FULL", "NORMAL"] = "FULL",
        min_free_bytes: int = MIN_FREE_BYTES,
        clock: Callable[[], float] = time.time,
    ) -> Self:
        """Opens or creates. FULL survives a power cut, NORMAL a kill only. Intake stops at `min_free_bytes`.

        A file that is no store, is damaged, or has a version that we do not know is refused and left as it is."""
        writer = Writer(path, synchronous, min_free_bytes)
        try:
            await asyncio.shield(writer.opened)
        except asyncio.CancelledError:
            writer.close()
            raise
        return cls(path, writer, clock)

    async def accept(self, items: Sequence[NewEvent]) -> list[int]:
        """Returns the events' numbers once all of them are durable; after an error none of them is stored."""
        async with self._slots:
            ids = [next(self._ids) for _ in items]
            rows = self._rows(items, ids)
            if rows[0]:
                size_bytes = sum(len(item.data or b"") for item in items)
                await asyncio.shield(self._writer.submit("intake", partial(store_rows.insert, new=rows), size_bytes))
            return ids

    async def take(self, target: str, limit: int, now_s: float, bytes_max: int | None = None) -> list[Delivery]:
        """Deliveries due at `now_s`, longest due first; in flight until settled, postponed, buried or released.

        No further ones once they have `bytes_max` of data."""
        async with self._slots:
            future = self._writer.submit(
                "read", lambda db, _: store_rows.take(db, self._writer.backlog, target, limit, now_s, bytes_max)
            )
            try:
                taken: list[Delivery] = await asyncio.shield(future)
            except asyncio.CancelledError:  # nobody will see them
                future.add_done_callback(self._release_unseen)
                raise
            return taken

    async def settle(self, delivery: Delivery, *, replies: Sequence[NewEvent] = ()) -> bool:
        """Delivered; `replies` are accepted in the same transaction.

        False, and nothing is done, if `delivery` is out of date: settled, buried, postponed or dropped before. After an
        error it is still in flight: after StoreFull settle it again once there is room."""
        new = self._rows(replies, [next(self._ids) for _ in replies])
        settled: bool = await self._write(partial(store_rows.finish, delivery=delivery, new=new))
        return settled

    async def bury(self, delivery: Delivery, dead: NewEvent | None) -> bool:
        """Given up; `dead` is accepted in the same transaction. As `settle` otherwise."""
        return await self.settle(delivery, replies=(dead,) if dead else ())

    async def postpone(self, delivery: Delivery, due_s: float, error: str) -> bool:
        """Another attempt from `due_s` on, which will tell `error` (cut at 1,024 characters). As `settle` otherwise."""
        postponed: bool = await self._write(partial(store_rows.postpone, delivery=delivery, due_s=due_s, error=error))
        return postponed

    async def release(self, deliveries: Iterable[Delivery]) -> None:
        """Gives back deliveries that were not tried: due as before, attempt unchanged."""
        await asyncio.shield(self._release(deliveries))

    async def drop_target(self, target: str) -> int:
        """Removes all deliveries accepted until now, also those in flight; returns how many. A kill leaves some."""
        end, dropped = next(self._ids), 0
        while some := await self._write(partial(store_rows.drop, target=target, end=end)):
            dropped += some
        return dropped

    async def next_due_s(self, target: str) -> float | None:
        """When the next delivery that is not in flight is due (perhaps in the past); None if there is none."""
        backlog = self._writer.backlog
        future = self._writer.submit("read", lambda db, _: store_rows.next_due_s(db, backlog, target))
        due_s: float | None = await asyncio.shield(future)
        return due_s

    def depth(self, target: str) -> int:
        """Deliveries queued and in flight."""
        return self._writer.backlog.depths[target]

    def stats(self) -> Stats:
        """Costs two stat calls, however long the queues are. `depths` names every target that has deliveries."""
        backlog = self._writer.backlog
        return Stats(
            depths=dict(backlog.depths),
            in_flight={target: len(ids) for target, ids in list(backlog.in_flight.items())},
            transactions=self._writer.transactions,
            file_bytes=_size_bytes(self._path),
            log_bytes=_size_bytes(Path(f"{self._path}-wal")),
        )

    async def close(self) -> None:
        """Waits for what was handed in; later calls raise StoreError."""
        self._writer.close()
        await asyncio.shield(self._writer.closed)

    def _rows(self, items: Sequence[NewEvent], ids: Sequence[int]) -> Rows:
        return store_rows.rows(items, ids, self._clock())

    async def _write(self, run: Run) -> Any:
        """Not held back by WAITING_MAX: it makes the queue shorter, and there are no more than deliveries in flight."""
        return await asyncio.shield(self._writer.submit("write", run))

    def _release(self, deliveries: Iterable[Delivery]) -> asyncio.Future[Any]:
        keys = [(delivery.target, delivery.id) for delivery in deliveries]
        return self._writer.submit("read", lambda *_: self._writer.backlog.release(keys))

    def _release_unseen(self, taken: asyncio.Future[list[Delivery]]) -> None:
        with suppress(StoreError):  # not taken, or the store is closed: then all is due at the next opening
            self._release(taken.result())


def _size_bytes(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
