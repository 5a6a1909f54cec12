"""Brokers and Triggers of a platform: which event goes to whom.

    BrokerIngress -> accept -> one delivery for each Trigger whose filter passes -> Dispatcher of that Trigger
                       ^                                                              │
                       └────────────────────────── replies ───────────────────────────┘

A Sequence is run as the Brokers and Triggers that it stands for (sequence.py).

Filters are looked at when an event comes in. The deliveries of a Trigger belong to its name: they wait until a Trigger
of that name, its Broker and its subscriber are there, also after a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp

from knative.errors import NotFound, Unavailable
from knative.eventing.addresses import url_of
from knative.eventing.broker import arrived, no_broker
from knative.eventing.delivery import TTL_ATTRIBUTE, DeliverySpec, effective
from knative.eventing.destination import Destination
from knative.eventing.dispatcher import Counts, Dispatcher, Route
from knative.eventing.event import CloudEvent, InvalidEvent
from knative.eventing.event_metrics import EventMetrics
from knative.eventing.event_status import broker_status, not_applied, sequence_status, trigger_counts, trigger_status
from knative.eventing.sequence import parts_of
from knative.eventing.store import Delivery, EventStore, NewEvent, StoreError
from knative.eventing.stored import to_store
from knative.eventing.subscribers import Sender
from knative.resources.eventing import addressed_kind
from knative.resources.objects import Broker, Trigger
from knative.resources.objects import Sequence as Flow

FILE = "events.sqlite"
Key = tuple[str, str]  # namespace, name
_DEAD = "/dead-letters"  # behind the target of a Trigger: what it could not deliver


class Eventing:
    """Use `open` before the first Broker is taken; `exists` says whether there is an object of a kind (service,
    inferenceservice) in a namespace; `changed` is called when Brokers come or go. `folder` is made when needed."""

    def __init__(
        self,
        folder: Path,
        *,
        session: aiohttp.ClientSession,
        ingress: Callable[[], str],
        exists: Callable[[str, str, str], bool],
        changed: Callable[[], None],
        metrics: EventMetrics,
    ) -> None:
        self.path = folder / FILE
        self.brokers: dict[Key, Broker] = {}
        self.triggers: dict[Key, Trigger] = {}
        self.sequences: dict[Key, Flow] = {}
        self._made: dict[tuple[str, Key], datetime] = {}
        self._sender = Sender(session, ingress)
        self._exists = exists
        self._changed = changed
        self._metrics = metrics
        self._store: EventStore | None = None
        self._opening = asyncio.Lock()  # two may apply the first Broker at the same time
        self._dispatchers: dict[str, Dispatcher] = {}
        self._accepted: dict[Key, int] = {}
        metrics.watch(self._counted, self._depths)

    # -- life

    async def open(self) -> None:
        """Opens the store, once. Raises Unavailable when its file cannot be used."""
        async with self._opening:
            if self._store is not None:
                return
            try:
                self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._store = await EventStore.open(self.path)
            except (StoreError, OSError) as error:
                raise Unavailable(f"cannot keep events in {self.path.parent} (--data-dir): {error}") from None

    async def resume(self) -> None:
        """Opens the store if an earlier platform has left one."""
        if self.path.exists():
            await self.open()

    @property
    def sending(self) -> int:
        """Requests to subscribers under way."""
        return sum(dispatcher.sending for dispatcher in self._dispatchers.values())

    def pause(self) -> None:
        """Begins no further deliveries."""
        for dispatcher in self._dispatchers.values():
            dispatcher.pause()

    async def close(self) -> None:
        """What has not been delivered waits in the file."""
        await self._stop(list(self._dispatchers))
        store, self._store = self._store, None
        if store is not None:
            await store.close()

    # -- objects

    def take_broker(self, broker: Broker) -> None:
        self._take("broker", self.brokers, broker)

    def take_trigger(self, trigger: Trigger) -> None:
        self._take("trigger", self.triggers, trigger)

    async def take_sequence(self, sequence: Flow) -> None:
        """With its Brokers and Triggers, in place of those that it had."""
        before = self.sequences.get((sequence.namespace, sequence.name))
        parts = list(parts_of(sequence))
        for broker, trigger in parts:
            self.take_broker(broker)
            self.take_trigger(trigger)
        self._take("sequence", self.sequences, sequence)
        kept = {broker.name for broker, _ in parts}
        for broker, _ in parts_of(before) if before else ():
            if broker.name not in kept:
                await self._remove_part((broker.namespace, broker.name))

    async def remove_sequence(self, key: Key) -> None:
        """With what waits in it."""
        sequence = self.sequences.pop(key)
        self._made.pop(("sequence", key), None)
        for broker, _ in parts_of(sequence):
            await self._remove_part((broker.namespace, broker.name))

    async def _remove_part(self, key: Key) -> None:
        await self.remove_trigger(key)
        await self.remove_broker(key)

    def _take(self, kind: str, objects: dict[Key, Any], taken: Broker | Trigger | Flow) -> None:
        key = (taken.namespace, taken.name)
        self._made.setdefault((kind, key), datetime.now(UTC))
        objects[key] = taken
        self._settle()

    async def remove_broker(self, key: Key) -> None:
        """Its Triggers stay and get nothing; what waits for them is dropped, as with the channel of a cluster."""
        del self.brokers[key]
        self._accepted.pop(key, None)
        self._metrics.forget_broker(*key)
        self._made.pop(("broker", key), None)
        self._changed()
        for trigger in [one for one in self.triggers.values() if _broker_of(one) == key]:
            await self._drop((trigger.namespace, trigger.name))
        self._settle()  # the Broker may have been applied again meanwhile

    async def remove_trigger(self, key: Key) -> None:
        """With what waits for it, also when that is all there is. Raises NotFound."""
        known = self.triggers.pop(key, None)
        self._metrics.forget_trigger(*key)
        self._made.pop(("trigger", key), None)
        if not await self._drop(key) and known is None:
            raise NotFound(f"trigger {key[1]!r} not found in namespace {key[0]!r}")

    async def _drop(self, key: Key) -> int:
        targets = _targets(key)
        await self._stop(targets)
        if self._store is None:
            return 0
        return sum([await self._store.drop_target(target) for target in targets])

    async def _stop(self, targets: Sequence[str]) -> None:
        found = [self._dispatchers.pop(target, None) for target in targets]
        await asyncio.gather(*(dispatcher.close() for dispatcher in found if dispatcher is not None))

    def _settle(self) -> None:
        """After any change: a Trigger whose Broker is there has its dispatchers."""
        self._changed()
        for key, trigger in self.triggers.items():
            if self._store is not None and _broker_of(trigger) in self.brokers:
                for target, route in zip(_targets(key), (self._route, self._dead_route), strict=True):
                    if target not in self._dispatchers:
                        self._dispatchers[target] = self._dispatcher(self._store, target, key, route)
        self.wake()

    def wake(self) -> None:
        """Services have come or gone: some subscribers may have an address now."""
        for dispatcher in self._dispatchers.values():
            dispatcher.wake()

    def _dispatcher(self, store: EventStore, target: str, key: Key, route: Callable[[Key], Route | None]) -> Dispatcher:
        return Dispatcher(
            target,
            store,
            self._sender,
            route=lambda: route(key),
            intake=lambda delivery, events: self._replies(key, delivery, events),
            arrived=self._arrived,
            observe=lambda code, seconds: self._metrics.observe(*key, code, seconds),
        )

    # -- events

    def has_broker(self, namespace: str, name: str) -> bool:
        return (namespace, name) in self.brokers

    async def accept(self, namespace: str, name: str, events: Sequence[CloudEvent]) -> None:
        """Returns when the events are durable. Raises NotFound, StoreError, StoreFull, and Unavailable at the end."""
        if not self.has_broker(namespace, name):
            raise no_broker(namespace, name)
        if self._store is None:
            raise Unavailable("the platform is stopping")
        new = self._addressed(namespace, name, events)
        try:
            await self._store.accept(new)
        finally:  # a producer that goes away may leave events that are durable all the same
            self._arrived(new)

    def answered(self, namespace: str, name: str, status: int, events: int) -> None:
        """Counts what producers were told."""
        self._metrics.count_accepted(namespace, name, status, max(1, events))
        if status == 202:
            self._accepted[namespace, name] = self._accepted.get((namespace, name), 0) + events

    def _addressed(self, namespace: str, name: str, events: Sequence[CloudEvent]) -> list[NewEvent]:
        triggers = [one for one in self.triggers.values() if _broker_of(one) == (namespace, name)]
        broker = f"{namespace}/{name}"
        return [
            to_store(event, broker, [f"{one.namespace}/{one.name}" for one in triggers if one.filter.passes(event)])
            for event in events
        ]

    def _replies(self, key: Key, delivery: Delivery, events: Sequence[CloudEvent]) -> list[NewEvent]:
        """Ready for the store; those that have passed too often are left out: so loops end."""
        namespace, _, name = delivery.event.broker.partition("/")
        if (trigger := self.triggers.get(key)) is not None and trigger.reply is not None:
            name = trigger.reply
        entered: list[CloudEvent] = []
        for event in events:
            try:
                entered += arrived([event.changed({TTL_ATTRIBUTE: delivery.event.ttl})])
            except InvalidEvent:
                self._metrics.count_accepted(namespace, name, InvalidEvent.status, 1)
        if (namespace, name) in self.brokers and entered:
            self.answered(namespace, name, 202, len(entered))
        return self._addressed(namespace, name, entered)

    def _arrived(self, new: Sequence[NewEvent]) -> None:
        for target in {target for one in new for target in one.targets}:
            if (dispatcher := self._dispatchers.get(target)) is not None:
                dispatcher.wake()

    # -- routes

    def _route(self, key: Key) -> Route | None:
        """None while the Trigger is not ready."""
        trigger, delivery = self._delivery(key)
        if trigger is None or not (url := self._url_of(trigger.subscriber)):
            return None
        dead = _targets(key)[1] if delivery.dead_letter else ""
        return Route(
            url,
            trigger.namespace,
            delivery,
            trigger.max_in_flight,
            wants_reply=trigger.reply != "",
            tells_ttl=addressed_kind(trigger.subscriber) == "broker",
            dead_letters=dead,
        )

    def _dead_route(self, key: Key) -> Route | None:
        trigger, delivery = self._delivery(key)
        if trigger is None or delivery.dead_letter is None or not (url := self._url_of(delivery.dead_letter)):
            return None
        return Route(url, trigger.namespace, delivery, trigger.max_in_flight, wants_reply=False, tells_ttl=True)

    def _delivery(self, key: Key) -> tuple[Trigger | None, DeliverySpec]:
        trigger = self.triggers.get(key)
        broker = self.brokers.get(_broker_of(trigger)) if trigger else None
        if trigger is None or broker is None:
            return None, DeliverySpec()
        return trigger, effective(trigger.delivery, broker.delivery)

    def _url_of(self, destination: Destination) -> str:
        return url_of(destination, self._is_there)

    def _is_there(self, kind: str, namespace: str, name: str) -> bool:
        if kind == "sequence":
            return (namespace, name) in self.sequences
        return self.has_broker(namespace, name) if kind == "broker" else self._exists(kind, namespace, name)

    # -- what is shown

    def get_brokers(self, url: Callable[[str, str], str]) -> Iterator[tuple[Broker, datetime, dict[str, Any]]]:
        """Each with its age and its status."""
        for key, broker in sorted(self.brokers.items()):
            yield broker, self._made["broker", key], broker_status(*key, url(*key))

    def get_triggers(self) -> Iterator[tuple[Trigger, datetime, dict[str, Any]]]:
        """Each with its age and its status."""
        for key, trigger in sorted(self.triggers.items()):
            yield trigger, self._made["trigger", key], self._status(key, trigger)

    def get_sequences(self) -> Iterator[tuple[Flow, datetime, dict[str, Any]]]:
        """Each with its age and its status."""
        for key, sequence in sorted(self.sequences.items()):
            keys = [(broker.namespace, broker.name) for broker, _ in parts_of(sequence)]
            status = sequence_status(sequence, [self._status(one, self.triggers.get(one)) for one in keys])
            yield sequence, self._made["sequence", key], status

    def status(self, url: Callable[[str, str], str]) -> dict[str, list[dict[str, Any]]]:
        """Counts since the start, and what waits, also for Triggers that are not applied."""
        names = ("namespace", "name")
        brokers = [
            {**dict(zip(names, key, strict=True)), "url": url(*key), "accepted": self._accepted.get(key, 0)}
            for key in sorted(self.brokers)
        ]
        triggers = []
        for key in sorted({*self.triggers, *(_key(target) for target in self._depths())}):
            trigger, counts = self.triggers.get(key), [self._counts(target) for target in _targets(key)]
            counted = trigger_counts(trigger, self._status(key, trigger), *counts)
            triggers.append({**dict(zip(names, key, strict=True)), **counted})
        return {"brokers": brokers, "triggers": triggers}

    def _status(self, key: Key, trigger: Trigger | None) -> dict[str, Any]:
        waiting, dead = (self._depth(target) for target in _targets(key))
        if trigger is None:
            return not_applied(waiting, dead)
        return trigger_status(
            trigger,
            has_broker=_broker_of(trigger) in self.brokers,
            dead_letter_sink=self._delivery(key)[1].dead_letter,
            url_of=self._url_of,
            waiting=waiting,
            dead_waiting=dead,
        )

    def _depth(self, target: str) -> int:
        return self._store.depth(target) if self._store is not None else 0

    def _depths(self) -> dict[str, int]:
        return dict(self._store.stats().depths) if self._store is not None else {}

    def _counts(self, target: str) -> Counts:
        dispatcher = self._dispatchers.get(target)
        return dispatcher.counts if dispatcher else Counts()

    def _counted(self) -> dict[str, Counts]:
        return {target: dispatcher.counts for target, dispatcher in self._dispatchers.items()}


def _broker_of(trigger: Trigger) -> Key:
    return trigger.namespace, trigger.broker


def _targets(key: Key) -> tuple[str, str]:
    """In the store: of a Trigger, and of its dead letters."""
    target = "/".join(key)
    return target, target + _DEAD


def _key(target: str) -> Key:
    namespace, name, *_ = target.split("/")
    return namespace, name
