"""The breaker lets in what fits, in order, and loses neither a slot nor a waiting request."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.network.breaker import Breaker, QueueFull


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_of_26_requests_with_concurrency_2_four_are_refused() -> None:
    breaker = Breaker(2, 20)
    results: list[str] = []

    async def request() -> None:
        try:
            async with breaker.slot():
                await asyncio.sleep(0)
                results.append("served")
        except QueueFull:
            results.append("refused")

    await asyncio.gather(*(request() for _ in range(26)))
    assert (results.count("served"), results.count("refused")) == (22, 4)
    assert (breaker.running, breaker.waiting) == (0, 0)


async def test_a_newcomer_does_not_overtake_a_woken_request() -> None:
    breaker = Breaker(1, 10)
    await breaker.acquire()
    order: list[str] = []

    async def request(name: str) -> None:
        await breaker.acquire()
        order.append(name)

    first = asyncio.create_task(request("first"))
    await settle()
    breaker.release()  # the slot is the first one's, though its task has not run yet
    second = asyncio.create_task(request("second"))
    await settle()
    assert order == ["first"]
    breaker.release()
    await asyncio.gather(first, second)
    assert order == ["first", "second"]


async def test_a_slot_given_to_a_cancelled_request_goes_on_to_the_next() -> None:
    breaker = Breaker(1, 10)
    await breaker.acquire()
    first, second = (asyncio.create_task(breaker.acquire()) for _ in range(2))
    await settle()
    breaker.release()
    first.cancel()  # in the same turn of the loop
    await second
    assert first.cancelled()
    assert (breaker.running, breaker.waiting) == (1, 0)


async def test_a_request_cancelled_just_before_a_release_gets_no_slot() -> None:
    breaker = Breaker(1, 10)
    await breaker.acquire()
    first, second = (asyncio.create_task(breaker.acquire()) for _ in range(2))
    await settle()
    first.cancel()
    breaker.release()
    await second
    assert (breaker.running, breaker.waiting) == (1, 0)


async def test_more_capacity_wakes_and_less_lets_the_running_end() -> None:
    breaker = Breaker(0, 10)
    tasks = [asyncio.create_task(breaker.acquire()) for _ in range(3)]
    await settle()
    assert (breaker.running, breaker.waiting) == (0, 3)
    breaker.update_concurrency(2)
    await settle()
    assert (breaker.running, breaker.waiting) == (2, 1)
    breaker.update_concurrency(1)
    breaker.release()
    await settle()
    assert (breaker.running, breaker.waiting) == (1, 1)
    breaker.release()
    await asyncio.gather(*tasks)
    assert (breaker.running, breaker.waiting) == (1, 0)


async def test_a_breaker_without_slots_or_places_refuses_at_once() -> None:
    with pytest.raises(QueueFull):
        await Breaker(0, 0).acquire()


_steps = st.lists(
    st.one_of(
        st.just(("arrive", 0)),
        st.tuples(st.just("leave"), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("resize"), st.integers(0, 4)),
        st.just(("settle", 0)),
    ),
    max_size=60,
)


@given(capacity=st.integers(0, 4), depth=st.integers(0, 5), steps=_steps)
def test_any_order_of_events_keeps_the_counts_right(capacity: int, depth: int, steps: list[tuple[str, int]]) -> None:
    """Steps that fall between two settlings happen in one turn of the loop, where races are."""
    asyncio.run(_play(Breaker(capacity, depth), steps))


async def _play(breaker: Breaker, steps: list[tuple[str, int]]) -> None:
    waiting: list[asyncio.Task[None]] = []
    running: list[asyncio.Task[None]] = []

    async def look() -> None:
        await settle()
        admitted = [task for task in waiting if task.done() and not task.cancelled() and task.exception() is None]
        still = [task for task in waiting if not task.done()]
        assert [
            task for task in waiting if task in admitted or task in still
        ] == admitted + still  # first in, first out
        running.extend(admitted)
        waiting[:] = still
        assert breaker.running == len(running)
        assert breaker.waiting == len(waiting)
        assert not waiting or breaker.running >= breaker.capacity  # nobody waits beside a free slot

    for step, number in steps:
        if step == "arrive":
            waiting.append(asyncio.create_task(breaker.acquire()))
        elif step == "leave" and running:
            running.pop(number % len(running))
            breaker.release()
        elif step == "cancel" and waiting:
            waiting[number % len(waiting)].cancel()
        elif step == "resize":
            breaker.update_concurrency(number)
        elif step == "settle":
            await look()
    await look()
    breaker.update_concurrency(100)
    await look()
    assert not waiting
