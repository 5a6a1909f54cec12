"""Steps that wait at a stage are computed in one pass, each answered or refused for itself."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest
import uvicorn

from functions.contract import events
from functions.contract.errors import StageError, StageFailure, WrongPosition
from functions.contract.events import Event
from functions.contract.messages import Samples, Step
from functions.handler import Handler
from functions.service import StageService
from functions.settings import StageSettings
from functions.stage import Stage
from orchestrator.stage_connection import ReplicaConnections, Reply

StepOf = Callable[..., Step]


class Counting:
    """A stage that notes how many steps each pass had, and holds the first until `go` is set."""

    def __init__(self, stage: Stage) -> None:
        self.passes: list[int] = []
        self.begun, self.go = threading.Event(), threading.Event()
        self.broken: int | None = None  # a sequence whose passes fail
        self._stage = stage
        self._run = stage.runner.run
        stage.runner.run = self.run  # type: ignore[method-assign]  # in the way of every pass

    def run(self, sequences: Any, *rest: Any) -> Any:
        if self.broken in [sequence.id for sequence in sequences]:
            raise RuntimeError("out of luck")
        return self._run(sequences, *rest)

    def steps(self, steps: list[Step]) -> Any:
        self.passes.append(len(steps))
        self.begun.set()
        assert self.go.wait(60)
        return Stage.steps(self._stage, steps)


@pytest.fixture
def counting(stage_of: Callable[..., Stage], monkeypatch: pytest.MonkeyPatch) -> Any:
    stage = stage_of()
    found = Counting(stage)
    monkeypatch.setattr(stage, "steps", found.steps, raising=True)
    yield found, stage
    found.go.set()
    stage.runner.run = found._run


def service_of(stage: Stage, threads: int = 1) -> StageService:
    service = StageService(StageSettings(model="unused", blocks="0:4", plan="p", threads=threads))
    service._stage = stage  # loaded already
    return service


async def ask(service: StageService, step: Step) -> Samples:
    event = Event(events.STEP, "/tests", "1", events.TENSORS, bytearray(b"".join(step.to_body())), ADDRESS)
    reply = await service.answer(event, "127.0.0.1:1")
    assert reply is not None
    return Samples.from_body(b"".join([reply.data, *reply.rest]))


ADDRESS = {"plan": "p", "stage": "0"}


async def until(holds: Callable[[], bool]) -> None:
    while not holds():  # noqa: ASYNC110  # what is waited for happens in another thread, or tells nobody
        await asyncio.sleep(0.001)


async def asked(counting: Counting, service: StageService, *steps: Step) -> list[Samples | BaseException]:
    """The answers to steps of which the first is being computed when the others come."""
    first = asyncio.create_task(ask(service, steps[0]))
    await until(counting.begun.is_set)
    others = [asyncio.create_task(ask(service, step)) for step in steps[1:]]
    await until(lambda: len(service._waiting) == len(others))
    counting.go.set()
    return await asyncio.gather(first, *others, return_exceptions=True)


def token_of(answer: Samples | BaseException) -> int:
    assert isinstance(answer, Samples), answer
    return answer.items[0].token


async def test_what_waits_goes_together_and_is_answered_as_alone(
    counting: tuple[Counting, Stage], step_of: StepOf, reference: Any
) -> None:
    passes, stage = counting
    prompts = [[1, 2, 3], [9], [5] * 20, [7, 8]]
    steps = [step_of((number + 1, 0, prompt)) for number, prompt in enumerate(prompts)]
    answers = await asked(passes, service_of(stage), *steps)
    assert passes.passes == [1, 3]
    assert [token_of(answer) for answer in answers] == [reference(prompt, 1)[0] for prompt in prompts]


async def test_a_repeated_step_waits_for_the_one_that_it_repeats(
    counting: tuple[Counting, Stage], step_of: StepOf
) -> None:
    passes, stage = counting
    step = step_of((1, 0, [4, 5]))
    answers = await asked(passes, service_of(stage), step_of((2, 0, [1])), step, step)
    assert passes.passes == [1, 1, 1]
    assert token_of(answers[1]) == token_of(answers[2])


async def test_what_is_wrong_with_one_is_its_own_matter(
    counting: tuple[Counting, Stage], step_of: StepOf, reference: Any
) -> None:
    passes, stage = counting
    passes.broken = 4
    gap, broken, good = step_of((3, 7, [1])), step_of((4, 0, [1])), step_of((5, 0, [6, 6]))
    answers = await asked(passes, service_of(stage), step_of((2, 0, [1])), gap, broken, good)
    assert passes.passes == [1, 3]
    assert isinstance(answers[1], WrongPosition)
    assert isinstance(answers[2], StageFailure)
    assert token_of(answers[3]) == reference([6, 6], 1)[0]
    assert (stage.kv.position(4), stage.kv.position(5)) == (0, 2)


async def test_so_many_tokens_go_together_and_no_more(
    counting: tuple[Counting, Stage], step_of: StepOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("functions.service._TOGETHER_TOKENS_MAX", 10)
    passes, stage = counting
    steps = [step_of((number, 0, [1] * 4)) for number in range(1, 6)]
    answers = await asked(passes, service_of(stage), *steps)
    assert passes.passes == [1, 2, 2]
    assert not any(isinstance(answer, StageError) for answer in answers)


async def test_the_step_of_a_sender_that_has_left_is_not_computed(
    counting: tuple[Counting, Stage], step_of: StepOf
) -> None:
    passes, stage = counting
    service = service_of(stage)
    first = asyncio.create_task(ask(service, step_of((1, 0, [1]))))
    await until(passes.begun.is_set)
    second = asyncio.create_task(ask(service, step_of((2, 0, [1]))))
    await until(lambda: bool(service._waiting))
    second.cancel()
    await asyncio.gather(second, return_exceptions=True)
    assert not service._waiting
    passes.go.set()
    await first
    await ask(service, step_of((3, 0, [1])))
    assert passes.passes == [1, 1]
    assert stage.kv.position(2) == 0


async def test_nor_is_that_of_one_whose_connection_is_lost(counting: tuple[Counting, Stage], step_of: StepOf) -> None:
    """As an orchestrator does that gives up on a step."""
    passes, stage = counting
    service = service_of(stage)
    handler = Handler(service)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (await handler.event(scope, receive))(scope, receive, send)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_level="error"))
        serving = asyncio.create_task(server.serve([listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        staying, leaving = ReplicaConnections(), ReplicaConnections()
        first = asyncio.create_task(post(staying, url, step_of((1, 0, [4, 5]))))
        await until(passes.begun.is_set)
        with pytest.raises(TimeoutError):
            await post(leaving, url, step_of((2, 0, [6])), timeout_s=0.2)
        later = asyncio.create_task(post(staying, url, step_of((3, 0, [7]))))
        await until(lambda: len(service._waiting) == 2)
        passes.go.set()
        assert [(await first).status, (await later).status] == [200, 200]
        assert [stage.kv.position(sequence) for sequence in (1, 2, 3)] == [2, 0, 1]
        for connections in (staying, leaving):
            connections.close()
        server.should_exit = True
        await serving


async def post(connections: ReplicaConnections, url: str, step: Step, timeout_s: float = 60) -> Reply:
    event = Event(events.STEP, "/tests", "1", events.TENSORS, b"".join(step.to_body()), ADDRESS)
    headers, body = events.to_http(event)
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return await connections.post(url, lines, body, timeout_s)


async def test_only_quick_steps_are_computed_in_the_event_loop(
    counting: tuple[Counting, Stage], step_of: StepOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, stage = counting
    passes.go.set()
    threads: list[bool] = []
    compute = passes.steps

    def steps(steps: list[Step]) -> Any:
        threads.append(threading.current_thread() is threading.main_thread())
        return compute(steps)

    monkeypatch.setattr(stage, "steps", steps)
    service = service_of(stage)
    for limit_s, expected in ((60.0, [False, True, True]), (0.0, [True, False])):
        monkeypatch.setattr("functions.service._QUICK_S", limit_s)
        for number in range(len(expected)):
            await ask(service, step_of((number + 1, 0, [1])))
        assert threads == expected
        threads.clear()
    monkeypatch.setattr("functions.service._QUICK_S", 60.0)
    service = service_of(stage, threads=2)  # whose teams of threads would hinder each other
    for number in range(3):
        await ask(service, step_of((number + 1, 0, [1])))
    assert threads == [False] * 3


async def test_memory_goes_with_the_last_sequence(
    counting: tuple[Counting, Stage], step_of: StepOf, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes, stage = counting
    passes.go.set()
    forgotten: list[int] = []
    monkeypatch.setattr(stage.runner, "forget", lambda: forgotten.append(len(stage.kv)))
    service = service_of(stage)
    await ask(service, step_of((1, 0, [1]), (2, 0, [1])))
    for sequence in (1, 2, 3):
        release = Event(events.RELEASE, "/tests", "1", events.JSON, b'{"sequences": [%d]}' % sequence, ADDRESS)
        await service.answer(release, "127.0.0.1:1")
    assert forgotten == [0]
