"""Holds the requests of one revision until a replica has room, and says which. After pkg/activator/net/throttler.go."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Generic, Protocol, TypeVar

from knative.network.balancing import policy_for
from knative.network.breaker import QueueFull

QUEUE_DEPTH = 10_000  # requests (throttler.go, breakerQueueDepth)


class Backend(Protocol):
    """A ready replica, known by its address (HOST:PORT)."""

    @property
    def address(self) -> str: ...


B = TypeVar("B", bound=Backend)


class Throttler(Generic[B]):
    """Gives each request one replica: capacity is containerConcurrency for each, or any number for 0.

    Without a replica, or with all of them full, requests wait, first in, first out, at most `queue_depth` of them
    (upstream sets no bound for containerConcurrency 0; here there is one). `on_waiting` is called for each that
    begins to wait.
    """

    def __init__(
        self,
        revision: str,
        container_concurrency: int,
        *,
        queue_depth: int = QUEUE_DEPTH,
        on_waiting: Callable[[], None] = lambda: None,
        rng: random.Random | None = None,
    ) -> None:
        self.revision = revision
        self._queue_depth = queue_depth
        self._on_waiting = on_waiting
        self._policy = policy_for(container_concurrency, rng or random.Random())
        self._backends: list[B] = []
        self._in_flight: Counter[str] = Counter()  # by address; also of replicas that have gone
        self._waiters: deque[asyncio.Future[B]] = deque()

    @property
    def waiting(self) -> int:
        """Requests that have no replica yet."""
        return len(self._waiters)

    def set_backends(self, backends: Sequence[B]) -> None:
        """The replicas that are ready now. Those that are gone get nothing new; waiting requests go to new ones."""
        self._backends = sorted(backends, key=lambda backend: backend.address)
        self._hand_out()

    def refuse(self, error: Callable[[], Exception]) -> None:
        """Ends the waiting of all that wait now, each with an error of its own."""
        waiters, self._waiters = self._waiters, deque()
        for waiter in waiters:
            if not waiter.done():
                waiter.set_exception(error())

    @contextlib.asynccontextmanager
    async def reserve(self) -> AsyncIterator[B]:
        """A place at a replica for the time of an `async with`. Raises QueueFull. Safe to cancel."""
        backend = await self._acquire()
        try:
            yield backend
        finally:
            self._release(backend)

    async def _acquire(self) -> B:
        if (backend := self._pick()) is not None:  # and so nobody waits: a free place is handed out at once
            return backend
        if len(self._waiters) >= self._queue_depth:
            raise QueueFull
        waiter: asyncio.Future[B] = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        self._on_waiting()
        while True:
            backend = await self._wait(waiter)
            if backend in self._backends:
                return backend
            # it went away between being given and being taken: back to the head of the queue
            self._forget(backend)
            waiter = asyncio.get_running_loop().create_future()
            self._waiters.appendleft(waiter)
            self._hand_out()

    async def _wait(self, waiter: asyncio.Future[B]) -> B:
        try:
            return await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                if waiter.exception() is None:
                    self._release(waiter.result())  # given together with the cancellation: on to the next one
            else:
                with contextlib.suppress(ValueError):  # `_hand_out` may have passed over it already
                    self._waiters.remove(waiter)
            raise

    def _pick(self) -> B | None:
        index = self._policy([self._in_flight[backend.address] for backend in self._backends])
        if index is None:
            return None
        backend = self._backends[index]
        self._in_flight[backend.address] += 1
        return backend

    def _release(self, backend: B) -> None:
        self._forget(backend)
        self._hand_out()

    def _forget(self, backend: B) -> None:
        self._in_flight[backend.address] -= 1
        if not self._in_flight[backend.address]:
            del self._in_flight[backend.address]

    def _hand_out(self) -> None:
        while self._waiters:
            if self._waiters[0].cancelled():
                self._waiters.popleft()
            elif (backend := self._pick()) is not None:
                self._waiters.popleft().set_result(backend)
            else:
                return
