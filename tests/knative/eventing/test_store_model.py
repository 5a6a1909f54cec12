"""The durable queue against a model of one dictionary, through any order of calls, closings and kills."""

import asyncio
import shutil
import tempfile
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from knative.eventing.store import Delivery, Event, EventStore, NewEvent

T = TypeVar("T")
TARGETS = ("a", "b", "ü\x00")

batches = st.lists(
    st.builds(
        NewEvent,
        broker=st.sampled_from(["default/main", "jobs/main"]),
        key=st.text(max_size=5),
        attributes=st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=2),
        data=st.none() | st.binary(max_size=20),
        targets=st.lists(st.sampled_from(TARGETS), max_size=4),
        ttl=st.integers(0, 255),
    ),
    max_size=3,
)
which = st.integers(0, 1 << 16)


@dataclass
class Row:
    event: NewEvent
    accepted_s: float
    due_s: float
    attempt: int = 1
    error: str = ""
    in_flight: bool = False


class Model(RuleBasedStateMachine):
    """Events get a serial number in their key: it finds the row of a delivery, and numbers grow as the store's do."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.folder = Path(tempfile.mkdtemp())
        self.now_s = 1000.0
        self.serial = 0
        self.kills = 0
        self.rows: dict[tuple[int, str], Row] = {}
        self.held: list[Delivery] = []
        self.ended: list[Delivery] = []
        self.open(self.folder / "0.db")

    def do(self, call: Coroutine[None, None, T]) -> T:
        return self.loop.run_until_complete(call)

    def open(self, path: Path) -> None:
        self.path = path
        self.store = self.do(EventStore.open(path, synchronous="NORMAL", min_free_bytes=0, clock=lambda: self.now_s))

    def teardown(self) -> None:
        self.do(self.store.close())
        self.loop.close()
        shutil.rmtree(self.folder)

    def numbered(self, batch: list[NewEvent]) -> list[NewEvent]:
        first, self.serial = self.serial, self.serial + len(batch)
        return [replace(event, key=f"{first + index} {event.key}") for index, event in enumerate(batch)]

    def expect(self, batch: list[NewEvent]) -> None:
        for event in batch:
            for target in set(event.targets):
                self.rows[serial(event), target] = Row(event, self.now_s, self.now_s)

    def end(self, index: int) -> Delivery:
        delivery = self.held.pop(index % len(self.held))
        self.ended.append(delivery)
        return delivery

    @rule(batches=st.lists(batches, min_size=1, max_size=4))
    def accept_at_the_same_time(self, batches: list[list[NewEvent]]) -> None:
        batches = [self.numbered(batch) for batch in batches]

        async def accept() -> list[list[int]]:
            return await asyncio.gather(*map(self.store.accept, batches))

        ids = [number for batch in self.do(accept()) for number in batch]
        assert len(set(ids)) == len(ids) == sum(map(len, batches))
        for batch in batches:
            self.expect(batch)

    @rule(name=st.sampled_from(TARGETS), limit=st.integers(0, 5))
    def take(self, name: str, limit: int) -> None:
        due = sorted(
            (row.due_s, number)
            for (number, of), row in self.rows.items()
            if of == name and row.due_s <= self.now_s and not row.in_flight
        )[:limit]
        taken = self.do(self.store.take(name, limit, self.now_s))
        assert [serial(delivery.event) for delivery in taken] == [number for _, number in due]
        for delivery in taken:
            row = self.rows[serial(delivery.event), name]
            row.in_flight = True
            assert (delivery.target, delivery.accepted_s, delivery.attempt, delivery.error) == (
                name, row.accepted_s, row.attempt, row.error,
            )  # fmt: skip
            assert replace(row.event, targets=()) == NewEvent(
                **{name: getattr(delivery.event, name) for name in ("broker", "key", "attributes", "data", "ttl")},
                targets=(),
            )
        self.held += taken

    @precondition(lambda self: self.held)
    @rule(index=which, replies=batches)
    def settle(self, index: int, replies: list[NewEvent]) -> None:
        delivery, replies = self.end(index), self.numbered(replies)
        assert self.do(self.store.settle(delivery, replies=replies))
        del self.rows[serial(delivery.event), delivery.target]
        self.expect(replies)

    @precondition(lambda self: self.held)
    @rule(index=which, dead=batches)
    def bury(self, index: int, dead: list[NewEvent]) -> None:
        delivery, dead = self.end(index), self.numbered(dead[:1])
        assert self.do(self.store.bury(delivery, dead[0] if dead else None))
        del self.rows[serial(delivery.event), delivery.target]
        self.expect(dead)

    @precondition(lambda self: self.held)
    @rule(index=which, delay_s=st.integers(-3, 3), error=st.text(max_size=5))
    def postpone(self, index: int, delay_s: int, error: str) -> None:
        delivery = self.end(index)
        assert self.do(self.store.postpone(delivery, self.now_s + delay_s, error))
        row = self.rows[serial(delivery.event), delivery.target]
        row.due_s, row.error, row.attempt, row.in_flight = self.now_s + delay_s, error, row.attempt + 1, False

    @precondition(lambda self: self.held)
    @rule(index=which)
    def release(self, index: int) -> None:
        delivery = self.held.pop(index % len(self.held))
        self.do(self.store.release([delivery]))
        self.rows[serial(delivery.event), delivery.target].in_flight = False

    @precondition(lambda self: self.ended)
    @rule(index=which, replies=batches)
    def what_has_ended_stays_so(self, index: int, replies: list[NewEvent]) -> None:
        delivery = self.ended[index % len(self.ended)]
        assert not self.do(self.store.settle(delivery, replies=self.numbered(replies)))
        assert not self.do(self.store.postpone(delivery, self.now_s, "late"))

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds: int) -> None:
        self.now_s += seconds

    @rule(name=st.sampled_from(TARGETS))
    def drop_target(self, name: str) -> None:
        dropped = [key for key in self.rows if key[1] == name]
        assert self.do(self.store.drop_target(name)) == len(dropped)
        for key in dropped:
            del self.rows[key]
        self.ended += [delivery for delivery in self.held if delivery.target == name]
        self.held = [delivery for delivery in self.held if delivery.target != name]

    @rule(kill=st.booleans())
    def open_again(self, kill: bool) -> None:
        path = self.path
        if kill:  # the files as a kill would leave them, at this point
            self.kills += 1
            path = self.folder / f"{self.kills}.db"
            for suffix in ("", "-wal"):
                shutil.copyfile(f"{self.path}{suffix}", f"{path}{suffix}")
        self.do(self.store.close())
        self.open(path)
        self.held, self.ended = [], []
        for row in self.rows.values():
            row.in_flight = False

    @invariant()
    def counts_agree(self) -> None:
        depths = Counter(target for _, target in self.rows)
        in_flight = Counter(target for (_, target), row in self.rows.items() if row.in_flight)
        assert self.store.stats().depths == depths
        assert self.store.stats().in_flight == in_flight
        for target in TARGETS:
            assert self.store.depth(target) == depths[target]
            due_s = [row.due_s for (_, of), row in self.rows.items() if of == target and not row.in_flight]
            assert self.do(self.store.next_due_s(target)) == min(due_s, default=None)


def serial(event: Event) -> int:
    return int(event.key.split()[0])


TestModel = Model.TestCase
TestModel.settings = settings(max_examples=30, stateful_step_count=30, deadline=None)
