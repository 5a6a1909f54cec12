"""The results store for an event loop: one thread uses it, and what comes at the same time shares one transaction."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar

from knative.eventing.store_errors import StoreError, is_beyond_trust
from orchestrator.batches.results_store import Item, Result, ResultsStore

GROUP_ITEMS_MAX = 2000
GROUP_BYTES_MAX = 8 << 20
LOOK_EVERY_S = 1.0  # for what another process has written

T = TypeVar("T")


class GroupCommit:
    """Belongs to the event loop in which it was made.

    `distrust` is called once when nobody knows any more what the disk holds: the process should end."""

    def __init__(self, store: ResultsStore, distrust: Callable[[Exception], None] = lambda error: None) -> None:
        self._store = store
        self._distrust = distrust
        self._thread = ThreadPoolExecutor(1, "results")
        self._waiting: list[tuple[Sequence[Item], asyncio.Future[list[bool]]]] = []
        self._flushing: asyncio.Task[None] | None = None
        self._news: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._closing = False

    async def add(self, items: Sequence[Item]) -> list[bool]:
        """Whether each was new, once all are durable. Raises StoreError: then none of them is stored."""
        future: asyncio.Future[list[bool]] = asyncio.get_running_loop().create_future()
        self._waiting.append((items, future))
        if self._flushing is None:
            self._flushing = asyncio.create_task(self._flush())
        return await future

    async def call(self, call: Callable[[ResultsStore], T]) -> T:
        """What `call` returns for the store, in its thread."""
        try:
            return await asyncio.get_running_loop().run_in_executor(self._thread, call, self._store)
        except StoreError as error:
            if isinstance(error.__cause__, Exception) and is_beyond_trust(error.__cause__):
                self._distrust(error)
            raise

    async def page(self, batch: str, after: int, limit: int, wait_s: float) -> tuple[list[bytes], int]:
        """As ResultsStore.results; without anything new it waits for up to `wait_s`."""
        clock = asyncio.get_running_loop().time
        until_s = clock() + wait_s
        news = asyncio.Event()
        self._news[batch].add(news)
        try:
            while True:
                news.clear()
                lines, last = await self.call(lambda store: store.results(batch, after, limit))
                left_s = until_s - clock()
                if lines or left_s <= 0 or self._closing:
                    return lines, last
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), min(left_s, LOOK_EVERY_S))
        finally:
            self._news[batch].discard(news)
            if not self._news[batch]:
                del self._news[batch]

    def release(self) -> None:
        """Ends all waiting for news."""
        self._closing = True
        for batch in list(self._news):
            self._wake(batch)

    async def close(self) -> None:
        self.release()
        if self._flushing is not None:
            await self._flushing
        await self.call(ResultsStore.close)
        self._thread.shutdown()

    async def _flush(self) -> None:
        while self._waiting:
            group = self._gather()
            items = [item for some, _ in group for item in some]
            try:
                is_new = await self.call(partial(ResultsStore.add, items=items))
            except Exception as error:
                for _, future in group:
                    if not future.done():
                        future.set_exception(error)
                continue
            for some, future in group:
                answer, is_new = is_new[: len(some)], is_new[len(some) :]
                if not future.done():
                    future.set_result(answer)
            for batch in {item.batch for item in items}:
                self._wake(batch)
        self._flushing = None

    def _gather(self) -> list[tuple[Sequence[Item], asyncio.Future[list[bool]]]]:
        count = size_bytes = 0
        for items, _ in self._waiting:
            count += 1
            size_bytes += sum(len(item.line) for item in items if isinstance(item, Result))
            if count >= GROUP_ITEMS_MAX or size_bytes >= GROUP_BYTES_MAX:
                break
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group

    def _wake(self, batch: str) -> None:
        for news in self._news.get(batch, ()):
            news.set()
