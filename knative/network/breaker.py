"""The limit on requests that run at once, and on those that queue for it. After pkg/queue/breaker.go."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator


class QueueFull(Exception):
    """No slot and no place to wait: answer 503 "pending request queue full"."""


class Breaker:
    """At most `capacity` requests run at once, at most `capacity + queue_depth` are inside; the rest is refused.

    Waiting is first in, first out: a slot that comes free belongs to the longest waiting request, so a newcomer
    never overtakes. One event loop only.
    """

    def __init__(self, capacity: int, queue_depth: int) -> None:
        self._capacity = capacity
        self._queue_depth = queue_depth
        self._running = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def capacity(self) -> int:
        return self._capacity

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._running

    @property
    def waiting(self) -> int:
        """Requests in the queue."""
        return len(self._waiters)

    def update_concurrency(self, capacity: int) -> None:
        """Sets the number of slots. Requests that run beyond a lower one end undisturbed."""
        self._capacity = capacity
        self._hand_out()

    async def acquire(self) -> None:
        """Waits for a slot. Raises QueueFull at once if the queue is full. Safe to cancel."""
        if self._running < self._capacity:  # and so nobody waits: a free slot is handed out at once
            self._running += 1
            return
        if self._running + len(self._waiters) >= self._capacity + self._queue_depth:
            raise QueueFull
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            self._give_up(waiter)
            raise

    def release(self) -> None:
        """Ends what `acquire` began."""
        self._running -= 1
        self._hand_out()

    @contextlib.asynccontextmanager
    async def slot(self) -> AsyncIterator[None]:
        """A slot for the time of an `async with`. Raises QueueFull."""
        await self.acquire()
        try:
            yield
        finally:
            self.release()

    def _give_up(self, waiter: asyncio.Future[None]) -> None:
        if not waiter.cancelled():
            self.release()  # the slot came together with the cancellation: on to the next one
            return
        with contextlib.suppress(ValueError):  # `_hand_out` may have passed over it already
            self._waiters.remove(waiter)

    def _hand_out(self) -> None:
        # slots are counted here and not by the woken task, so that no newcomer takes them in between
        while self._waiters and self._running < self._capacity:
            waiter = self._waiters.popleft()
            if not waiter.cancelled():
                self._running += 1
                waiter.set_result(None)
