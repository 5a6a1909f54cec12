"""The door of a stage: events of a real generation, mutated, at two stages in this process."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from starlette.requests import Request as AsgiRequest

from functions.contract import events
from functions.contract.errors import InvalidEvent
from functions.contract.events import Event
from functions.contract.messages import Opening, Samples, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.contract.scoring import RESULT, SCORE, SPENT_PATH, Ask, Texts
from functions.handler import Handler
from functions.service import StageService
from functions.settings import StageSettings
from tools.fuzzing.asgi import App, Reply, ask
from tools.fuzzing.door import Verdict, Violation, judged
from tools.fuzzing.http_text import Request, mutated_request
from tools.fuzzing.mutations import mutated, mutated_json
from tools.fuzzing.tensors import mutated_tensors
from tools.fuzzing.tiny_model import BLOCKS, NAME

PLAN = "0123456789abcdef"
SPANS = (f"0:{BLOCKS // 2}", f"{BLOCKS // 2}:{BLOCKS}")
_HOST = "stage-%d"  # by which an input says which of the stages it is for
_KV_BYTES_MAX = 1 << 20
_HELD_MAX = 100  # sequences of hostile events that a stage keeps until they are released
_CONTROL = 4_242_424_242_424_242  # a sequence that no input names but by the rarest chance
_PROMPT = (84, 111, 32, 98, 101)
_HEADERS = tuple(f"ce-{name}" for name in ("type", "id", "source", "specversion", "plan", "stage", "lane", "dataref",
                                           "usedref", "batch", "customid", "requestid", "time", "x"))  # fmt: skip


class StageDoor:
    """Events to the stages' own handlers. The control is one sequence that goes on step by step between, and now and
    then at the same time as, the hostile ones."""

    name = "stage-events"

    def __init__(self, checkpoint: Path, claims: Path) -> None:
        self._runner = asyncio.Runner()
        self._services = [
            StageService(
                StageSettings(
                    model=str(checkpoint), model_name=NAME, blocks=span, index=index, count=len(SPANS), plan=PLAN,
                    kv_bytes_max=_KV_BYTES_MAX, body_bytes_max=256 << 10, claims=str(claims), claim_bytes=512,
                    score_tokens_max=512, threads=1,
                )
            )
            for index, span in enumerate(SPANS)
        ]  # fmt: skip
        self._apps = [app_of(service) for service in self._services]
        self._runner.run(self._woken())
        self.good = self._runner.run(recorded(self._apps))
        self._held = [{piece for request in self.good for piece in _sequences(request.body)} for _ in SPANS]
        self._runner.run(self._release())
        self._right = self._runner.run(self._generated(40))
        self._made: list[int] = []

    def make(self, random: Random) -> bytes:
        return hostile_event(random, self.good).to_bytes()

    def take(self, data: bytes) -> Verdict:
        return self._runner.run(self._take(data))

    def check(self) -> None:
        self._runner.run(self._check())

    def close(self) -> None:
        for service in self._services:
            service.stop()
        self._runner.close()  # and what waits for leases to run out

    async def _take(self, data: bytes) -> Verdict:
        request = Request.from_bytes(data)
        index = 1 if ("host", _HOST % 1) in request.headers else 0
        if zlib.crc32(data) % 8:
            reply = await ask(self._apps[index], request)
        else:  # in the company of a good one
            reply, _ = await asyncio.gather(ask(self._apps[index], request), self._go_on())
        if reply is None:
            return "refused"
        self._held[index] |= _sequences(request.body)
        if len(self._held[index]) > _HELD_MAX:
            await self._release()
        verdict = judged(reply.status, reply.headers, reply.body)
        if verdict == "refused" and request.method.upper() == "POST" and reply.status != 499:  # 499: nobody is there
            _expect_error_event(reply)
        return verdict

    async def _check(self) -> None:
        await self._release()
        await self._go_on()
        for index, app in enumerate(self._apps):
            info = json.loads((await _post(app, index, events.WAKE, events.JSON, b"{}")).body)
            if info["sequences"] > 1 or info["kv_bytes_used"] > len(_PROMPT + tuple(self._right)) * 2 * 128:
                raise Violation("harm", f"stage {index} holds more than the control: {info}")
        if len(self._made) > 20:  # also a sequence that begins after all of that is right
            await self._forget_control()

    async def _go_on(self) -> None:
        """One more token of the control; it begins anew after the last."""
        if len(self._made) == len(self._right):
            await self._forget_control()
        made = len(self._made)
        token = await self._token(_CONTROL, _PROMPT if not made else (self._made[-1],), 0 if not made else made + 4)
        if token != self._right[made]:
            raise Violation("harm", f"the control's token {made} is {token}, not {self._right[made]}")
        self._made.append(token)

    async def _forget_control(self) -> None:
        self._made = []
        for index, app in enumerate(self._apps):
            await _post(app, index, events.RELEASE, events.JSON, json.dumps({"sequences": [_CONTROL]}).encode())

    async def _generated(self, count: int) -> list[int]:
        tokens: list[int] = []
        for made in range(count):
            piece = _PROMPT if not made else (tokens[-1],)
            tokens.append(await self._token(_CONTROL, piece, 0 if not made else made + 4))
        self._made = tokens
        await self._forget_control()
        return tokens

    async def _token(self, sequence: int, tokens: Sequence[int], start: int) -> int:
        body = b"".join(step_of((sequence, start, tokens)).to_body())
        for index, app in enumerate(self._apps):
            body = (await _post(app, index, events.STEP, events.TENSORS, body)).body
        return Samples.from_body(bytearray(body)).items[0].token

    async def _release(self) -> None:
        """What hostile events have opened goes, as a lease's end would have it."""
        for index, app in enumerate(self._apps):
            held, self._held[index] = self._held[index] - {_CONTROL}, set()
            await _post(app, index, events.RELEASE, events.JSON, json.dumps({"sequences": sorted(held)}).encode())

    async def _woken(self) -> None:
        for index, app in enumerate(self._apps):
            await _post(app, index, events.WAKE, events.JSON, b"{}")


def app_of(service: StageService) -> App:
    """The stage's handler as the framework calls it."""
    handler = Handler(service)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        answer = await handler(AsgiRequest(scope, receive))
        await answer(scope, receive, send)

    return app


def step_of(*chunks: tuple[int, int, Sequence[int]], params: SamplingParams | None = None) -> Step:
    """A first stage's step of (sequence, start, tokens)."""
    slices = tuple(Slice(sequence, start, len(tokens)) for sequence, start, tokens in chunks)
    opened = {
        sequence: Opening(params or SamplingParams(), len(tokens)) for sequence, start, tokens in chunks if not start
    }
    return Step(slices, np.array([t for _, _, tokens in chunks for t in tokens], dtype=np.int32), None, opened)


def event_request(index: int, kind: str, content_type: str, body: bytes, path: str = "/", **more: str) -> Request:
    """An event as the orchestrator, a stage or a broker would send it to stage `index`."""
    event = Event(kind, "/fuzz", "1", content_type, b"", {"plan": PLAN, "stage": str(index), **more})
    headers, _ = events.to_http(event)
    return Request("POST", path, (("host", _HOST % index), *headers.items()), body)


async def recorded(apps: Sequence[App]) -> list[Request]:
    """Good events of all types, each as it came to its stage."""
    sampled = SamplingParams(0.8, 5, 0.9, 0.01, 1.1, 0.1, -0.1, {3: 1.5}, 42, 3)
    steps = [
        step_of((7, 0, [1, 2, 3])),
        step_of((7, 3, [4])),
        step_of((9, 0, list(range(20))), (7, 4, [9]), params=sampled),
        step_of((9, 20, [5]), (7, 5, [6])),
        step_of(*((sequence, 0, [sequence]) for sequence in range(100, 132))),
    ]
    found = []
    for step in steps:
        body = b"".join(step.to_body())
        for index, app in enumerate(apps):
            found.append(event_request(index, events.STEP, events.TENSORS, body, lane="3"))
            body = (await ask_well(app, found[-1])).body
    for asked in (Ask(), Ask("embedding", "last")):
        body = b"".join(Texts((3, 2), np.array([1, 2, 3, 4, 5], dtype=np.int32), None, asked).to_body())
        request = event_request(0, SCORE, events.TENSORS, body, batch="b", customid="a", requestid="r")
        found.append(request)
        reply = await ask_well(apps[0], request)
        passed = tuple((name, value) for name, value in reply.headers.items() if name != "content-length")
        found.append(Request("POST", "/", (("host", _HOST % 1), *passed), reply.body))
        result = await ask_well(apps[1], found[-1])
        if not reply.body:  # the claim is spent by now
            found[-1] = replace(found[-1], body=b"")
        passed = tuple((name, value) for name, value in result.headers.items() if name != "content-length")
        found.append(Request("POST", SPENT_PATH, (("host", _HOST % 1), *passed), result.body))
    for index in range(len(apps)):
        found.append(event_request(index, events.WAKE, events.JSON, b"{}"))
        found.append(event_request(index, events.RELEASE, events.JSON, b'{"sequences": [7, 9, 123]}'))
        found.append(Request("GET", "/readyz", (("host", _HOST % index),)))
    return found


def hostile_event(random: Random, good: Sequence[Request]) -> Request:
    """A good event with other attributes, another body, or the body of another one."""
    request = random.choice(good)
    kind = random.randrange(10)
    if kind < 2:
        return mutated_request(random, request, _HEADERS)
    if kind == 2:
        return replace(request, body=random.choice(good).body)
    if not request.body:
        return replace(request, body=mutated(random, b"{}"))
    if dict(request.headers).get("content-type") == events.TENSORS:
        request = replace(request, body=mutated_tensors(random, request.body))
    else:
        request = replace(request, body=mutated_json(random, json.loads(request.body)))
    return mutated_request(random, request, _HEADERS) if kind == 3 else request


async def ask_well(app: App, request: Request) -> Reply:
    """The reply to a request that is right. Raises Violation for any other."""
    reply = await ask(app, request)
    if reply is None or reply.status != 200:
        raise Violation("harm", f"a good event was answered {reply and reply.status}: {reply and reply.body[:300]!r}")
    return reply


async def _post(app: App, index: int, kind: str, content_type: str, body: bytes) -> Reply:
    return await ask_well(app, event_request(index, kind, content_type, body))


def _sequences(body: bytes) -> set[int]:
    try:
        return {piece.sequence for piece in Step.from_body(body).slices}
    except InvalidEvent:
        return set()


def _expect_error_event(reply: Reply) -> None:
    try:
        kind, data = reply.headers["ce-type"], json.loads(reply.body)
        right = kind in (events.ERROR, RESULT) and bool(data)
    except (KeyError, ValueError):
        right = False
    if not right:
        raise Violation("crash", f"status {reply.status} without an error event: {reply.body[:200]!r}")
