"""Requests wait for a replica, get one in order, and none is lost when replicas or clients go."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from knative.network.breaker import QueueFull
from knative.network.throttler import Throttler


@dataclass(frozen=True)
class Place:
    address: str


A, B, C = (Place(f"127.0.0.1:{port}") for port in (1001, 1002, 1003))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


class Request:
    """A request that holds its replica until it is told to end."""

    def __init__(self, throttler: Throttler[Place]) -> None:
        self.backend: Place | None = None
        self.end = asyncio.Event()
        self.task = asyncio.create_task(self._run(throttler))

    async def _run(self, throttler: Throttler[Place]) -> None:
        async with throttler.reserve() as self.backend:
            await self.end.wait()


async def test_requests_wait_at_zero_and_then_go_to_the_replica_in_order() -> None:
    told: list[int] = []
    throttler = Throttler[Place]("r", 1, on_waiting=lambda: told.append(1))
    requests = [Request(throttler) for _ in range(3)]
    await settle()
    assert throttler.waiting == len(told) == 3
    throttler.set_backends([A])
    await settle()
    assert [request.backend for request in requests] == [A, None, None]
    throttler.set_backends([A, B])
    await settle()
    assert [request.backend for request in requests] == [A, B, None]
    requests[1].end.set()
    await settle()
    assert [request.backend for request in requests] == [A, B, B]
    for request in requests:
        request.end.set()
    await asyncio.gather(*(request.task for request in requests))
    assert throttler.waiting == 0


async def test_one_too_many_is_refused() -> None:
    throttler = Throttler[Place]("r", 0, queue_depth=2)
    requests = [Request(throttler) for _ in range(2)]
    await settle()
    with pytest.raises(QueueFull):
        async with throttler.reserve():
            pass
    for request in requests:
        request.end.set()
    throttler.set_backends([A])
    await asyncio.gather(*(request.task for request in requests))


async def test_without_a_limit_all_go_at_once() -> None:
    throttler = Throttler[Place]("r", 0, rng=random.Random(1))
    throttler.set_backends([A, B])
    requests = [Request(throttler) for _ in range(40)]
    await settle()
    per = [sum(request.backend == place for request in requests) for place in (A, B)]
    assert per == [20, 20]  # with two replicas the choice of two is the less busy one
    for request in requests:
        request.end.set()
    await asyncio.gather(*(request.task for request in requests))


async def test_a_small_limit_packs_in_address_order() -> None:
    throttler = Throttler[Place]("r", 2)
    throttler.set_backends([C, A, B])
    requests = [Request(throttler) for _ in range(5)]
    await settle()
    assert [request.backend for request in requests] == [A, A, B, B, C]
    for request in requests:
        request.end.set()
    await asyncio.gather(*(request.task for request in requests))


async def test_a_replica_that_goes_before_it_is_taken_is_not_used() -> None:
    throttler = Throttler[Place]("r", 1)
    first, second = Request(throttler), Request(throttler)
    await settle()
    throttler.set_backends([A])
    throttler.set_backends([])  # in the same turn of the loop
    await settle()
    assert (first.backend, second.backend, throttler.waiting) == (None, None, 2)
    throttler.set_backends([B])
    await settle()
    assert (first.backend, second.backend, throttler.waiting) == (B, None, 1)  # it kept its place in the queue
    first.end.set()
    second.end.set()
    await asyncio.gather(first.task, second.task)


async def test_a_place_given_to_a_cancelled_request_goes_on_to_the_next() -> None:
    throttler = Throttler[Place]("r", 1)
    first, second = Request(throttler), Request(throttler)
    await settle()
    throttler.set_backends([A])
    first.task.cancel()  # in the same turn of the loop
    await settle()
    assert (first.backend, second.backend, throttler.waiting) == (None, A, 0)
    second.end.set()
    await second.task


_steps = st.lists(
    st.one_of(
        st.just(("arrive", 0)),
        st.tuples(st.just("leave"), st.integers(0, 20)),
        st.tuples(st.just("cancel"), st.integers(0, 20)),
        st.tuples(st.just("backends"), st.integers(0, 7)),
        st.just(("settle", 0)),
    ),
    max_size=60,
)


@given(limit=st.integers(0, 5), steps=_steps)
def test_no_request_is_lost_and_no_replica_overbooked(limit: int, steps: list[tuple[str, int]]) -> None:
    asyncio.run(_play(limit, steps))


async def _play(limit: int, steps: list[tuple[str, int]]) -> None:
    throttler = Throttler[Place]("r", limit, rng=random.Random(1))
    requests: list[Request] = []
    backends: list[Place] = []

    async def look() -> None:
        await settle()
        requests[:] = [request for request in requests if not request.task.done()]
        held = [request.backend for request in requests if request.backend is not None]
        assert throttler.waiting == len(requests) - len(held)
        if limit:
            assert all(held.count(place) <= limit for place in (A, B, C))
        free = any(not limit or held.count(place) < limit for place in backends)
        assert not (throttler.waiting and free)

    for step, number in steps:
        if step == "arrive":
            requests.append(Request(throttler))
        elif step == "leave" and requests:
            requests[number % len(requests)].end.set()
        elif step == "cancel" and requests:
            requests[number % len(requests)].task.cancel()
        elif step == "backends":
            backends = [place for bit, place in enumerate((A, B, C)) if number >> bit & 1]
            throttler.set_backends(backends)
        else:
            await look()
    await look()
    throttler.set_backends([A, B, C])
    for request in requests:
        request.end.set()
    async with asyncio.timeout(10):
        await asyncio.gather(*(request.task for request in requests), return_exceptions=True)
    assert throttler.waiting == 0
