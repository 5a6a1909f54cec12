"""Delivers the events of one target, a bounded number at once, so that no subscriber waits for another.

store -> take -> send -> delivered: settle, replies come in with it
                      -> failed: postpone, or bury once the attempts are used up: the dead letter comes in with it
                      -> busy (429 or 503 with Retry-After): wait, and send again; no attempt is used up
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import structlog

from knative.eventing.delivery import DeliverySpec, dead_letter, is_retryable, wait_s, without_ttl
from knative.eventing.event import CloudEvent
from knative.eventing.store import Delivery, EventStore, NewEvent, StoreError, StoreFull
from knative.eventing.stored import from_store, to_store
from knative.eventing.subscribers import Answer, Sender

log = structlog.get_logger()

BUSY_S_MIN, BUSY_S_MAX = 1.0, 60.0  # bounds of what a Retry-After may ask for
_AHEAD = 3  # times what a subscriber gets at once may be taken from the file: ready, under way, being written
HELD_BYTES_MAX = 64 << 20  # of data in memory, and one event more; so large events are fewer at once
_JITTER = 0.1  # share of that; those who were told the same must not come back together
_FULL_S = 1.0  # between looks for room on a full disk
BROKEN_S = 5.0  # between looks at a store that gives errors
_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True)
class Route:
    """Where the deliveries of a target go at the moment. `dead_letters` is the target of those that fail, or ""."""

    url: str
    namespace: str
    delivery: DeliverySpec
    max_in_flight: int
    wants_reply: bool = True
    tells_ttl: bool = False  # to Brokers and dead letter sinks; so loops through them end
    dead_letters: str = ""


@dataclass(slots=True)
class Counts:
    """Since the platform started."""

    delivered: int = 0
    retried: int = 0  # failed attempts with another one to come
    busy: int = 0  # answers that asked for patience
    dead_lettered: int = 0
    lost: int = 0  # given up without a dead letter sink


class Dispatcher:
    """`route` gives None as long as nothing can be delivered. `intake` makes the events of a reply ready for the store;
    `observe` gets the status and the seconds since the event was accepted; `arrived` is told who has new deliveries."""

    def __init__(
        self,
        target: str,
        store: EventStore,
        sender: Sender,
        *,
        route: Callable[[], Route | None],
        intake: Callable[[Delivery, Sequence[CloudEvent]], list[NewEvent]],
        arrived: Callable[[Sequence[NewEvent]], None],
        observe: Callable[[int, float], None],
    ) -> None:
        self.target = target
        self.counts = Counts()
        self._store = store
        self._sender = sender
        self._route = route
        self._intake = intake
        self._arrived = arrived
        self._observe = observe
        self._woken = asyncio.Event()
        self._ready: deque[Delivery] = deque()  # taken ahead: none waits for the file while its subscriber has room
        self._running: set[asyncio.Task[None]] = set()  # to the end of their last write
        self._occupied = 0  # of those, the ones without an answer
        self._held_bytes = 0  # of data, ready and running
        self._paused = False
        self.sending = 0  # requests under way
        self._loop = asyncio.create_task(self._run(), name=f"dispatch {target}")

    def wake(self) -> None:
        """There may be something to do: new events, another route."""
        self._woken.set()

    def pause(self) -> None:
        """Begins no further deliveries; those that run go on."""
        self._paused = True

    async def close(self) -> None:
        """Stops. What had not ended stays in flight for the store, until it is dropped or opened again."""
        self.pause()
        tasks = [self._loop, *self._running]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            self._woken.clear()
            try:
                look_again_s = await self._take()
            except StoreError as error:
                log.error("event_store_failed", target=self.target, error=str(error))
                look_again_s = BROKEN_S
            with suppress(TimeoutError):
                async with asyncio.timeout(look_again_s):
                    await self._woken.wait()

    async def _take(self) -> float | None:
        """Takes what is due and may soon be sent; returns when to look again, None: not before somebody wakes."""
        self._begin()
        route = self._route()
        if route is None or self._paused:
            return None
        unwritten = len(self._running) - self._occupied
        wanted = _AHEAD * route.max_in_flight - self._occupied - len(self._ready) - unwritten
        room_bytes = HELD_BYTES_MAX - self._held_bytes
        if wanted <= 0 or room_bytes <= 0:
            return None
        taken = await self._store.take(self.target, wanted, time.time(), room_bytes)
        self._ready += taken
        self._held_bytes += sum(_size_bytes(delivery) for delivery in taken)
        self._begin()
        if len(taken) == wanted or self._held_bytes >= HELD_BYTES_MAX:
            return None
        due_s = await self._store.next_due_s(self.target)
        return None if due_s is None else max(0.0, due_s - time.time())

    def _begin(self) -> None:
        """Sends what is ready, as far as the subscriber has room."""
        route = self._route()
        while route and self._ready and self._occupied < route.max_in_flight and not self._paused:
            delivery = self._ready.popleft()
            task = asyncio.create_task(self._deliver(delivery))
            self._running.add(task)
            self._occupied += 1
            task.add_done_callback(partial(self._ended, _size_bytes(delivery)))

    def _ended(self, size_bytes: int, task: asyncio.Task[None]) -> None:
        self._running.discard(task)
        self._held_bytes -= size_bytes
        self._woken.set()

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            try:
                event = from_store(delivery.event)
                route, answer = await self._answer(event)
            finally:
                self._occupied -= 1
                self._begin()
            await self._conclude(delivery, event, route, answer)
        except StoreError as error:
            log.error("event_store_failed", target=self.target, event_id=delivery.event.key, error=str(error))
            await self._again_later(delivery)
        except Exception:  # a mistake here must lose no event, and stop no others
            log.exception("delivery_failed", target=self.target, event_id=delivery.event.key)
            await self._again_later(delivery)

    async def _again_later(self, delivery: Delivery) -> None:
        """The event may come twice, as nobody could note that it was delivered."""
        await asyncio.sleep(BROKEN_S)
        with suppress(StoreError):  # a store that gives nothing any more: due again after a restart
            await self._store.release([delivery])

    async def _answer(self, event: CloudEvent) -> tuple[Route, Answer]:
        """Of a subscriber that is not busy. The place in flight is kept meanwhile: who is busy gets no other events."""
        while True:
            route = self._route()
            if route is None:
                wait = BUSY_S_MIN  # gone since; it may come back
            else:
                answer = await self._send(event, route)
                if answer.retry_after_s is None:
                    return route, answer
                self.counts.busy += 1
                wait = min(max(answer.retry_after_s, BUSY_S_MIN), BUSY_S_MAX)
            await asyncio.sleep(wait * (1 + _JITTER * random.random()))

    async def _send(self, event: CloudEvent, route: Route) -> Answer:
        self.sending += 1
        try:
            return await self._sender.send(
                event if route.tells_ttl else without_ttl(event),
                route.url,
                namespace=route.namespace,
                event_format=route.delivery.format,
                timeout_s=route.delivery.timeout_s,
                wants_reply=route.wants_reply,
            )
        finally:
            self.sending -= 1

    async def _conclude(self, delivery: Delivery, event: CloudEvent, route: Route, answer: Answer) -> None:
        if answer.delivered:
            await self._settle(delivery, answer.events)
            self.counts.delivered += 1
        elif is_retryable(answer.status) and delivery.attempt <= route.delivery.retry:
            due_s = time.time() + wait_s(route.delivery, delivery.attempt - 1)
            await self._kept(lambda: self._store.postpone(delivery, due_s, _text(answer)))
            self.counts.retried += 1
        else:
            await self._bury(delivery, event, route, answer)
        self._observe(answer.code, max(0.0, time.time() - delivery.accepted_s))

    async def _settle(self, delivery: Delivery, events: Sequence[CloudEvent]) -> None:
        replies = self._intake(delivery, events)
        await self._kept(lambda: self._store.settle(delivery, replies=replies))
        self._arrived(replies)

    async def _bury(self, delivery: Delivery, event: CloudEvent, route: Route, answer: Answer) -> None:
        dead = None
        if route.dead_letters:
            letter = dead_letter(event, route.url, answer.code, answer.body)
            dead = to_store(letter, delivery.event.broker, [route.dead_letters])
            self.counts.dead_lettered += 1
        else:
            self.counts.lost += 1
        log.warning(
            "event_given_up",
            target=self.target,
            event_id=delivery.event.key,
            attempts=delivery.attempt,
            status=answer.status,
            error=_text(answer),
            dead_letter=bool(dead),
        )
        await self._kept(lambda: self._store.bury(delivery, dead))
        self._arrived([dead] if dead else [])

    async def _kept(self, write: Callable[[], Awaitable[bool]]) -> None:
        """Writes once there is room on the disk. Raises StoreError for anything else."""
        while True:
            try:
                await write()
                return
            except StoreFull as error:
                log.warning("event_store_full", target=self.target, error=str(error))
                await asyncio.sleep(_FULL_S)


def _size_bytes(delivery: Delivery) -> int:
    return len(delivery.event.data or b"")


def _text(answer: Answer) -> str:
    said = answer.body[:_ERROR_CHARS].decode(errors="replace").strip()
    return said if answer.status is None else f"{answer.status} {said}".strip()
