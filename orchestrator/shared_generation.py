"""Generations with an idempotency key: one task for each, read by as many requests as bring the key.

    requests of one key ──┬──> the generation that runs: what there is of it so far, then the rest as it comes
                          └──> what one that has ended came to, for some time

One that nobody reads any more goes on for a while, as a client that was cut off comes back. A generation that failed is
not kept: the next request of its key begins it anew, and gets the same tokens, as its seed comes out of the key.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from orchestrator.generation import GenerationError, past_deadline
from orchestrator.idempotency import Kept, Key, reused
from orchestrator.metrics import SHARED

READERS_MAX = 64  # of one key at a time
_AT_ONCE = 64  # items read from what is there before others get their turn

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SharedSettings:
    keep_s: float = 600.0
    count_max: int = 4096
    bytes_max: int = 64 << 20
    linger_s: float = 15.0  # 0: nobody waits for a client that has gone


@dataclass(eq=False)
class _Generation(Generic[T]):
    """`items` grow until it has `ended`; `readers` are told of each that is new."""

    body: str  # digest of the request's
    begun_s: int
    items: list[T] = field(default_factory=list)
    size_bytes: int = 0
    ended: bool = False
    error: Exception | None = None
    readers: set[asyncio.Event] = field(default_factory=set)
    task: asyncio.Task[None] | None = None
    end_of_linger: asyncio.TimerHandle | None = None

    def tell(self) -> None:
        for news in self.readers:
            news.set()


class SharedGenerations(Generic[T]):
    """`size_of` is what an item takes in memory, in bytes, about."""

    def __init__(
        self,
        model: str,
        size_of: Callable[[T], int],
        settings: SharedSettings | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings = settings or SharedSettings()
        self._model = model
        self._size_of = size_of
        self._clock = clock
        self._running: dict[str, _Generation[T]] = {}
        self._kept = Kept[_Generation[T]](self._settings.keep_s, self._settings.count_max, self._settings.bytes_max)

    def begun_s(self, key: Key) -> int | None:
        """When the generation of this key began, in Unix seconds; None where there is none. Raises GenerationError
        (422) where it is of another request."""
        found = self._find(key)
        return None if found is None else found.begun_s

    async def read(
        self, key: Key, start: Callable[[], AsyncGenerator[T, None]], deadline_s: float | None = None
    ) -> AsyncGenerator[T, None]:
        """All items of the key's generation from its first on; `start` begins it where there is none. What it raises,
        every reader gets. Raises GenerationError (422, 429, and 504 past `deadline_s`)."""
        generation = self._find(key)
        if generation is None:
            generation = self._begin(key, start)
            SHARED.labels(self._model, "begun").inc()
        else:
            SHARED.labels(self._model, "repeated" if generation.ended else "joined").inc()
        news = self._enter(generation)
        impatient = False
        try:
            at = 0
            while True:
                while at < len(generation.items):
                    yield generation.items[at]
                    at += 1
                    if at % _AT_ONCE == 0:
                        await asyncio.sleep(0)
                if generation.error is not None:
                    raise generation.error.with_traceback(None)
                if generation.ended:
                    return
                impatient = not await _told(news, deadline_s)
                if impatient:
                    raise past_deadline()
        finally:
            self._leave(generation, news, impatient)

    async def close(self) -> None:
        """Ends all that run."""
        tasks = [generation.task for generation in self._running.values() if generation.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _find(self, key: Key) -> _Generation[T] | None:
        found = self._running.get(key.digest) or self._kept.get(key.digest, self._clock())
        if found is not None and found.body != key.body:
            SHARED.labels(self._model, "refused").inc()
            raise reused()
        return found

    def _begin(self, key: Key, start: Callable[[], AsyncGenerator[T, None]]) -> _Generation[T]:
        generation = _Generation[T](key.body, int(time.time()))
        self._running[key.digest] = generation
        generation.task = asyncio.create_task(self._run(key, generation, start()))
        return generation

    async def _run(self, key: Key, generation: _Generation[T], items: AsyncGenerator[T, None]) -> None:
        error: Exception | None = GenerationError(
            "the generation was stopped; send the request again", status=503, code="stopped", retry_after_s=1
        )
        try:
            async with aclosing(items):
                async for item in items:
                    generation.items.append(item)
                    generation.size_bytes += self._size_of(item)
                    generation.tell()
            error = None
        except Exception as failure:
            error = failure
        finally:
            generation.ended, generation.error = True, error
            if self._running.get(key.digest) is generation:
                del self._running[key.digest]
            if error is None:
                self._kept.put(key.digest, generation, generation.size_bytes, self._clock())
            if generation.end_of_linger is not None:
                generation.end_of_linger.cancel()
            generation.tell()

    def _enter(self, generation: _Generation[T]) -> asyncio.Event:
        if len(generation.readers) >= READERS_MAX:
            raise GenerationError(
                f"{READERS_MAX} requests with this Idempotency-Key are being answered; send it again later",
                status=429,
                code="too_many_requests",
                retry_after_s=5,
            )
        if generation.end_of_linger is not None:
            generation.end_of_linger.cancel()
            generation.end_of_linger = None
        news = asyncio.Event()
        generation.readers.add(news)
        return news

    def _leave(self, generation: _Generation[T], news: asyncio.Event, impatient: bool) -> None:
        generation.readers.discard(news)
        if generation.readers or generation.ended:
            return
        assert generation.task is not None
        if impatient or not self._settings.linger_s:
            # not to be joined from now on: what follows would read an end that is none
            self._forget(generation)
            generation.task.cancel()
            return
        loop = asyncio.get_running_loop()
        generation.end_of_linger = loop.call_later(self._settings.linger_s, self._linger_over, generation)

    def _linger_over(self, generation: _Generation[T]) -> None:
        self._forget(generation)
        assert generation.task is not None
        generation.task.cancel()

    def _forget(self, generation: _Generation[T]) -> None:
        for digest, running in self._running.items():
            if running is generation:
                del self._running[digest]
                return


async def _told(news: asyncio.Event, deadline_s: float | None) -> bool:
    """Waits for news; whether there are any before the deadline."""
    news.clear()
    try:
        async with asyncio.timeout(None if deadline_s is None else deadline_s - time.monotonic()):
            await news.wait()
    except TimeoutError:
        return False
    return True
