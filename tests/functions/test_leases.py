"""Sequences that nobody touches are freed when their lease is over, and no others."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any

import pytest

from functions.contract import events
from functions.contract.errors import WrongPosition
from functions.contract.events import Event
from functions.contract.messages import Step
from functions.leases import Leases
from functions.runner import Runner
from functions.service import StageService
from functions.settings import StageSettings
from functions.stage import Stage

StepOf = Callable[..., Step]
LEASE_S = 60.0


class Clock:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stage(runner_of: Callable[[str], Runner], clock: Clock) -> Stage:
    return Stage(runner_of("0:4"), 1 << 20, LEASE_S, clock)


def test_a_lease_is_over_after_its_time_and_counts_from_the_last_touch(clock: Clock) -> None:
    leases = Leases(LEASE_S, clock)
    leases.touch([1, 2, 3])
    clock.now_s += LEASE_S / 2
    assert leases.renew([3, 2, 9]) == [9]
    clock.now_s += LEASE_S / 2
    assert leases.expired() == []
    clock.now_s += 1
    assert leases.expired() == [1]
    leases.forget([1, 2])
    clock.now_s += LEASE_S
    assert leases.expired() == [3]
    assert leases.renew([1]) == [1]


def test_without_a_lease_nothing_expires(clock: Clock) -> None:
    leases = Leases(0, clock)
    leases.touch([1])
    clock.now_s += 1e9
    assert leases.expired() == []


def test_quiet_is_the_time_since_the_last_touch_of_any(clock: Clock) -> None:
    leases = Leases(LEASE_S, clock)
    leases.touch([1])
    clock.now_s += 5
    leases.renew([2])
    assert leases.quiet_s == 5
    leases.renew([1])
    assert leases.quiet_s == 0


def test_a_stage_frees_what_no_step_has_touched(stage: Stage, step_of: StepOf, clock: Clock) -> None:
    stage.step(step_of((1, 0, [1, 2, 3]), (2, 0, [4])))
    clock.now_s += LEASE_S - 1
    stage.step(step_of((2, 1, [5])))
    clock.now_s += 2
    assert stage.expire() == [1]
    assert (stage.kv.position(1), stage.kv.position(2)) == (0, 2)
    with pytest.raises(WrongPosition) as refused:
        stage.step(step_of((1, 3, [1])))
    assert refused.value.positions == {1: 0}
    clock.now_s += LEASE_S
    assert stage.expire() == [2]
    assert (len(stage.kv), stage.kv.bytes_used) == (0, 0)


def test_released_sequences_have_no_lease(stage: Stage, step_of: StepOf, clock: Clock) -> None:
    stage.step(step_of((1, 0, [1])))
    stage.release([1])
    clock.now_s += 2 * LEASE_S
    assert stage.expire() == []
    assert stage.leases.renew([1]) == [1]


# -- behind events


def service_of(stage: Stage, clock: Clock, **settings: Any) -> StageService:
    service = StageService(StageSettings(model="unused", blocks="0:4", plan="p", **settings), clock=clock)
    service._stage = stage  # loaded already
    return service


async def ask(service: StageService, kind: str, data: bytes, content_type: str = events.JSON) -> Event:
    event = Event(kind, "/tests", "1", content_type, bytearray(data), {"plan": "p", "stage": "0"})
    reply = await service.answer(event, "127.0.0.1:1")
    assert reply is not None
    return reply


async def step(service: StageService, step: Step) -> None:
    await ask(service, events.STEP, b"".join(step.to_body()), events.TENSORS)


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # what is waited for tells nobody
        await asyncio.sleep(0.001)


async def test_an_idle_stage_looks_for_leases_that_are_over_by_itself(
    runner_of: Callable[[str], Runner], step_of: StepOf, clock: Clock
) -> None:
    stage = Stage(runner_of("0:4"), 1 << 20, 0.01, clock)
    service = service_of(stage, clock)
    await step(service, step_of((1, 0, [1, 2])))
    await asyncio.sleep(0.05)
    assert len(stage.kv) == 1, "the clock stands still"
    clock.now_s += 1
    await until(lambda: not len(stage.kv))
    await until(lambda: service._expiry is not None and service._expiry.done())
    await step(service, step_of((2, 0, [1, 2])))  # and once more, after there was nothing to look for
    clock.now_s += 1
    await until(lambda: not len(stage.kv))


async def test_a_renewal_keeps_sequences_and_names_those_that_are_gone(
    stage: Stage, step_of: StepOf, clock: Clock
) -> None:
    service = service_of(stage, clock)
    await step(service, step_of((1, 0, [1, 2]), (2, 0, [3])))
    clock.now_s += LEASE_S - 1
    reply = await ask(service, events.RENEW, b'{"sequences": [7, 1]}')
    assert reply.type == events.RENEWED
    assert json.loads(bytes(reply.data)) == {"unknown": [7]}
    clock.now_s += 2
    assert stage.expire() == [2]


async def test_a_stage_that_loads_knows_no_sequence(clock: Clock) -> None:
    service = StageService(StageSettings(model="unused", blocks="0:4", plan="p"), clock=clock)
    reply = await ask(service, events.RENEW, b'{"sequences": [7]}')
    assert json.loads(bytes(reply.data)) == {"unknown": [7]}


# -- a process that was told to end


async def test_a_stage_leaves_when_its_sequences_have_left(stage: Stage, step_of: StepOf, clock: Clock) -> None:
    service = service_of(stage, clock, grace_s=20)
    await step(service, step_of((1, 0, [1])))
    assert not service.leaving
    service.stop()
    assert service.leaving
    assert not service.left
    await ask(service, events.RELEASE, b'{"sequences": [1]}')
    assert service.left


async def test_it_leaves_when_nobody_cares_for_them_or_the_grace_is_over(
    stage: Stage, step_of: StepOf, clock: Clock
) -> None:
    service = service_of(stage, clock, grace_s=10)
    await step(service, step_of((1, 0, [1])))
    clock.now_s += 100
    service.stop()
    assert not service.left, "whoever holds them has to notice first"
    clock.now_s += 2
    await step(service, step_of((1, 1, [1])))
    clock.now_s += 2
    assert not service.left
    service.probed()
    clock.now_s += 2
    assert not service.left
    clock.now_s += 1.5
    assert service.left
    await step(service, step_of((1, 2, [1])))
    assert not service.left
    clock.now_s += 2.5
    assert service.left, "10 s after it was told to"


def test_a_stage_that_holds_nothing_leaves_at_once(stage: Stage, clock: Clock) -> None:
    service = service_of(stage, clock)
    service.stop()
    assert service.left
