"""Events and deliveries, and what is done to their rows; no threads, no transactions.

An event is one row, however many targets it has; a delivery is one row for an event and a target, due at a time. What
is in flight is known in memory only: after a kill it is due again.
"""

from __future__ import annotations

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

ERROR_CHARS_MAX = 1024
DROPPED_AT_ONCE = 1000  # deliveries; some 10 ms

# (id, broker, key, attributes, data, ttl, accepted_s) of events; (event, target, due_s) of deliveries
Rows = tuple[list[tuple[int, str, str, str, bytes | None, int, float]], list[tuple[int, str, float]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """`key` names the event for people and for de-duplication: its source and id. The store does not look into it."""

    broker: str
    key: str
    attributes: Mapping[str, str]
    data: bytes | None
    ttl: int


@dataclass(frozen=True, slots=True, kw_only=True)
class NewEvent(Event):
    """An event on its way in. One without targets is accepted and not stored; a target named twice counts once."""

    targets: Sequence[str]


@dataclass(frozen=True, slots=True)
class Delivery:
    """One attempt to deliver `event` (number `id`) to `target`. It can be settled, postponed or buried once."""

    id: int
    target: str
    event: Event
    attempt: int  # the first is 1
    accepted_s: float  # Unix time
    error: str  # of the attempt before; "" at the first


@dataclass(slots=True)
class Changes:
    """What a transaction does to the Backlog, once it is committed."""

    depths: Counter[str] = field(default_factory=Counter)
    ended: list[tuple[str, int]] = field(default_factory=list)  # (target, id) no longer in flight


class Backlog:
    """Counts of each target, and what is in flight. Written by one thread, read by any."""

    def __init__(self, depths: Mapping[str, int]) -> None:
        self.depths = Counter(depths)
        self.in_flight: defaultdict[str, set[int]] = defaultdict(set)

    def apply(self, changes: Changes) -> None:
        self.release(changes.ended)
        for target, change in changes.depths.items():
            self.depths[target] += change
            if not self.depths[target]:
                del self.depths[target]

    def release(self, taken: Iterable[tuple[str, int]]) -> None:
        for target, event in taken:
            ids = self.in_flight.get(target, set())
            ids.discard(event)
            if not ids:
                self.in_flight.pop(target, None)


def count(db: sqlite3.Connection) -> tuple[Backlog, int]:
    """What the file holds, and the id for the next event. Reads the index of deliveries once."""
    (last,) = db.execute("SELECT max(id) FROM event").fetchone()
    return Backlog(dict(db.execute("SELECT target, count(*) FROM delivery GROUP BY target"))), (last or 0) + 1


def rows(items: Sequence[NewEvent], ids: Sequence[int], accepted_s: float) -> Rows:
    new: Rows = ([], [])
    events, deliveries = new
    for number, item in zip(ids, items, strict=True):
        if item.targets:
            attributes = json.dumps(dict(item.attributes), separators=(",", ":"))
            events.append((number, item.broker, item.key, attributes, item.data, item.ttl, accepted_s))
            deliveries += [(number, target, accepted_s) for target in dict.fromkeys(item.targets)]
    return new


def insert(db: sqlite3.Connection, changes: Changes, new: Rows) -> None:
    events, deliveries = new
    db.executemany("INSERT INTO event VALUES (?, ?, ?, ?, ?, ?, ?)", events)
    db.executemany("INSERT INTO delivery VALUES (?, ?, ?, 1, '')", deliveries)
    changes.depths.update(target for _, target, _ in deliveries)


def take(
    db: sqlite3.Connection, backlog: Backlog, target: str, limit: int, now_s: float, bytes_max: int | None
) -> list[Delivery]:
    in_flight = backlog.in_flight.get(target, set())
    due = db.execute(
        "SELECT event FROM delivery WHERE target = ? AND due_s <= ? ORDER BY due_s, event LIMIT ?",
        (target, now_s, limit + len(in_flight)),
    ).fetchall()  # to the end: an unfinished SELECT would keep the log from being begun anew
    taken: list[Delivery] = []
    size_bytes = 0
    for (event,) in due:
        if len(taken) == limit or (bytes_max is not None and size_bytes >= bytes_max):
            break
        if event not in in_flight:
            taken.append(_delivery(db, event, target))
            size_bytes += len(taken[-1].event.data or b"")
    if taken:
        backlog.in_flight[target].update(delivery.id for delivery in taken)
    return taken


def _delivery(db: sqlite3.Connection, number: int, target: str) -> Delivery:
    broker, key, attributes, data, ttl, accepted_s, attempt, error = db.execute(
        "SELECT broker, key, attributes, data, ttl, accepted_s, attempt, error "
        "FROM event JOIN delivery ON event = id WHERE id = ? AND target = ?",
        (number, target),
    ).fetchone()
    event = Event(broker=broker, key=key, attributes=json.loads(attributes), data=data, ttl=ttl)
    return Delivery(number, target, event, attempt, accepted_s, error)


def next_due_s(db: sqlite3.Connection, backlog: Backlog, target: str) -> float | None:
    in_flight = backlog.in_flight.get(target, set())
    first = db.execute(
        "SELECT due_s, event FROM delivery WHERE target = ? ORDER BY due_s, event LIMIT ?", (target, 1 + len(in_flight))
    ).fetchall()
    return next((float(due_s) for due_s, event in first if event not in in_flight), None)


def finish(db: sqlite3.Connection, changes: Changes, delivery: Delivery, new: Rows) -> bool:
    """The delivery goes, the event with its last one, and `new` comes; nothing of it if `delivery` is out of date."""
    key = (delivery.id, delivery.target, delivery.attempt)
    if not db.execute("DELETE FROM delivery WHERE event = ? AND target = ? AND attempt = ?", key).rowcount:
        return False
    _delete_delivered(db, [delivery.id])
    changes.depths[delivery.target] -= 1
    changes.ended.append((delivery.target, delivery.id))
    insert(db, changes, new)
    return True


def postpone(db: sqlite3.Connection, changes: Changes, delivery: Delivery, due_s: float, error: str) -> bool:
    changed = db.execute(
        "UPDATE delivery SET due_s = ?, attempt = attempt + 1, error = ? "
        "WHERE event = ? AND target = ? AND attempt = ?",
        (due_s, error[:ERROR_CHARS_MAX], delivery.id, delivery.target, delivery.attempt),
    ).rowcount
    if changed:
        changes.ended.append((delivery.target, delivery.id))
    return bool(changed)


def drop(db: sqlite3.Connection, changes: Changes, target: str, end: int) -> int:
    """Removes some deliveries of `target`, of events before number `end`; returns how many, 0 if none are left."""
    ids = [
        event for (event,) in db.execute(
            "SELECT event FROM delivery INDEXED BY delivery_due WHERE target = ? AND event < ? LIMIT ?",
            (target, end, DROPPED_AT_ONCE),
        )
    ]  # fmt: skip
    db.executemany("DELETE FROM delivery WHERE event = ? AND target = ?", [(event, target) for event in ids])
    _delete_delivered(db, ids)
    changes.depths[target] -= len(ids)
    changes.ended += [(target, event) for event in ids]
    return len(ids)


def _delete_delivered(db: sqlite3.Connection, ids: Sequence[int]) -> None:
    db.executemany(
        "DELETE FROM event WHERE id = ?1 AND NOT EXISTS (SELECT 1 FROM delivery WHERE event = ?1)",
        [(number,) for number in ids],
    )
