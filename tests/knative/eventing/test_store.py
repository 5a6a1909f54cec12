"""The durable queue: what a caller can rely on while the process lives."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from knative.eventing.store import EventStore, NewEvent, StoreError, StoreFull

TARGET = "default/score"
NOW_S = 1000.0
NEVER_FREE_BYTES = 1 << 62  # more room than any disk has: intake is stopped


def event(key: str, *targets: str, data: bytes | None = b"{}") -> NewEvent:
    return NewEvent(
        broker="default/main", key=key, attributes={"id": key}, data=data, targets=targets or (TARGET,), ttl=255
    )


async def opened(path: Path, **options: object) -> EventStore:
    return await EventStore.open(path, synchronous="NORMAL", clock=lambda: NOW_S, **options)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[EventStore]:
    store = await opened(tmp_path / "broker.db")
    yield store
    await store.close()


async def keys(store: EventStore, target: str = TARGET, now_s: float = NOW_S) -> list[str]:
    return [delivery.event.key for delivery in await store.take(target, 10_000, now_s)]


async def test_an_event_comes_out_as_it_went_in(store: EventStore) -> None:
    new = event("a", "x", "y", "x", data=None)
    [number] = await store.accept([new])
    [x], [y] = await store.take("x", 9, NOW_S), await store.take("y", 9, NOW_S)
    assert (x.id, x.target, x.attempt, x.accepted_s, x.error) == (number, "x", 1, NOW_S, "")
    assert x.event == y.event
    assert (x.event.broker, x.event.key, x.event.attributes, x.event.data, x.event.ttl) == (
        "default/main", "a", {"id": "a"}, None, 255,
    )  # fmt: skip


async def test_calls_at_the_same_time_share_transactions(store: EventStore) -> None:
    before = store.stats().transactions
    await asyncio.gather(*(store.accept([event(str(number))]) for number in range(500)))
    assert store.depth(TARGET) == 500
    assert store.stats().transactions - before < 100


async def test_more_callers_than_may_wait_are_all_served(store: EventStore) -> None:
    numbers = await asyncio.gather(*(store.accept([event(str(number))]) for number in range(2500)))
    assert len({number for [number] in numbers}) == store.depth(TARGET) == 2500


async def test_a_batch_with_a_bad_event_is_refused_whole_and_alone(store: EventStore) -> None:
    batches = [[event(f"{number}"), event(f"{number}-2")] for number in range(40)]
    batches[17][1] = event("\ud800")  # no UTF-8 for it
    results = await asyncio.gather(*(store.accept(batch) for batch in batches), return_exceptions=True)
    assert [number for number, result in enumerate(results) if isinstance(result, StoreError)] == [17]
    assert store.depth(TARGET) == 78
    assert "17" not in await keys(store)


async def test_an_event_without_targets_is_accepted_and_not_stored(store: EventStore) -> None:
    quiet = replace(event("quiet"), targets=())
    assert len(await store.accept([quiet, event("loud")])) == 2
    assert await keys(store) == ["loud"]
    before = store.stats().transactions
    await store.accept([quiet])
    assert store.stats().transactions == before


async def test_what_is_in_flight_is_not_taken_again_and_counts_in_the_depth(store: EventStore) -> None:
    await store.accept([event(str(number)) for number in range(5)])
    first = await store.take(TARGET, 2, NOW_S)
    assert [delivery.event.key for delivery in first] == ["0", "1"]
    assert await keys(store) == ["2", "3", "4"]
    assert store.depth(TARGET) == store.stats().depths[TARGET] == store.stats().in_flight[TARGET] == 5
    await store.release(first)
    assert store.stats().in_flight[TARGET] == 3
    assert await keys(store) == ["0", "1"]


async def test_a_postponed_delivery_comes_at_its_time_with_its_error(store: EventStore) -> None:
    await store.accept([event("a"), event("b")])
    [a] = await store.take(TARGET, 1, NOW_S)
    assert await store.next_due_s(TARGET) == NOW_S  # of b: a is in flight
    assert await store.postpone(a, NOW_S + 5, "503 from the subscriber" * 100)
    [b] = await store.take(TARGET, 9, NOW_S)
    assert b.event.key == "b"
    assert await store.next_due_s(TARGET) == NOW_S + 5
    await store.release([b])
    [_, again] = await store.take(TARGET, 9, NOW_S + 5)  # b first: it has been due for longer
    assert (again.id, again.attempt) == (a.id, 2)
    assert again.error.startswith("503 from the subscriber")
    assert await store.next_due_s(TARGET) is None


async def test_a_delivery_ends_once(store: EventStore) -> None:
    await store.accept([event("a")])
    [first] = await store.take(TARGET, 1, NOW_S)
    await store.postpone(first, NOW_S, "timeout")
    [second] = await store.take(TARGET, 1, NOW_S)
    assert not await store.settle(first, replies=[event("late", "out")])  # an answer after the timeout
    assert not await store.postpone(first, NOW_S, "")
    assert store.stats().in_flight == {TARGET: 1}
    assert await store.settle(second, replies=[event("reply", "out")])
    assert not await store.settle(second, replies=[event("twice", "out")])
    assert not await store.bury(second, event("dead", "out"))
    assert await keys(store, "out") == ["reply"]
    assert store.stats().depths == {"out": 1}
    assert store.stats().in_flight == {"out": 1}


async def test_a_buried_delivery_leaves_its_dead_letter(store: EventStore) -> None:
    await store.accept([event("a", "x", "y"), event("b", "x")])
    a, b = await store.take("x", 9, NOW_S)
    assert await store.bury(a, event("dead a", "dls"))
    assert await store.bury(b, None)
    assert store.stats().depths == {"y": 1, "dls": 1}
    assert await keys(store, "dls") == ["dead a"]
    assert await keys(store, "y") == ["a"]


async def test_a_dropped_target_takes_nothing_from_others(store: EventStore) -> None:
    await store.accept([event(str(number), "x", "y") for number in range(1500)])
    in_flight = await store.take("x", 3, NOW_S)
    assert await store.drop_target("x") == 1500
    assert store.stats().depths == {"y": 1500}
    assert store.stats().in_flight == {}
    assert not await store.settle(in_flight[0], replies=[event("reply", "y")])
    assert len(await keys(store, "y")) == 1500


async def test_what_a_cancelled_caller_took_is_due_again(store: EventStore) -> None:
    await store.accept([event("a")])
    for passes in range(60):  # of the event loop, so that it is cancelled before, while and after the thread takes
        taking = asyncio.create_task(store.take(TARGET, 1, NOW_S))
        for _ in range(passes):
            await asyncio.sleep(0)
        taking.cancel()
        [result] = await asyncio.gather(taking, return_exceptions=True)
        if not isinstance(result, asyncio.CancelledError):
            await store.release(result)
        while not (taken := await store.take(TARGET, 1, NOW_S)):  # noqa: ASYNC110  # there is no event to wait for
            await asyncio.sleep(0)
        await store.release(taken)


async def test_close_waits_for_what_was_handed_in(tmp_path: Path) -> None:
    store = await opened(tmp_path / "broker.db")
    accepting = [asyncio.create_task(store.accept([event(str(number))])) for number in range(50)]
    await asyncio.sleep(0)
    await store.close()
    await store.close()
    assert all(task.result() for task in accepting)
    with pytest.raises(StoreError, match="is closed"):
        await store.accept([event("late")])
    store = await opened(tmp_path / "broker.db")
    assert store.depth(TARGET) == 50
    await store.close()


async def test_numbers_go_on_and_in_flight_is_due_again_after_reopening(tmp_path: Path) -> None:
    store = await opened(tmp_path / "broker.db")
    before = await store.accept([event("a"), event("b")])
    await store.take(TARGET, 1, NOW_S)
    await store.close()
    store = await opened(tmp_path / "broker.db")
    assert await keys(store) == ["a", "b"]
    assert min(await store.accept([event("c")])) > max(before)
    await store.close()


async def test_below_the_free_space_wanted_intake_stops_and_deliveries_go_on(tmp_path: Path) -> None:
    store = await opened(tmp_path / "broker.db", min_free_bytes=0)
    await store.accept([event("a"), event("b")])
    await store.close()
    store = await opened(tmp_path / "broker.db", min_free_bytes=NEVER_FREE_BYTES)
    with pytest.raises(StoreFull, match="at which intake stops: make room") as full:
        await store.accept([event("c")])
    assert full.value.status == 507
    a, b = await store.take(TARGET, 9, NOW_S)
    assert await store.settle(a, replies=[event("reply", "out")])
    assert await store.postpone(b, NOW_S, "busy")
    assert await keys(store) == ["b"]
    assert await keys(store, "out") == ["reply"]
    await store.close()


async def test_the_room_of_a_backlog_that_is_gone_is_given_back(store: EventStore) -> None:
    await store.accept([event(str(number), data=bytes(1 << 20)) for number in range(24)])
    assert store.stats().file_bytes + store.stats().log_bytes > 24 << 20
    await store.accept([event("stays", "other")])
    await store.drop_target(TARGET)
    async with asyncio.timeout(60):
        # the log is cut back after the file
        while max(store.stats().file_bytes, store.stats().log_bytes) > 1 << 20:  # noqa: ASYNC110  # no event to wait for
            await asyncio.sleep(0.05)
    assert await keys(store, "other") == ["stays"]
