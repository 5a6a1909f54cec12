"""Mode `later`: a request is acknowledged once it lies in a file, and its result reaches the sink whatever happens."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sqlite3
import subprocess
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import web

from knative.eventing.event import CloudEvent
from knative.eventing.http_binding import parse, to_binary
from orchestrator.batch_queue import RESULTS, UNDELIVERED, BatchQueue
from orchestrator.batch_requests import read_request
from orchestrator.batch_runner import BatchRunner
from orchestrator.batches.events import cancel_event, request_event
from orchestrator.choices import Service
from orchestrator.generation import GenerationError, GenerationRequest, Token
from orchestrator.tokenizer import load_tokenizer
from tests import warm

TIMEOUT_S = 60  # only reached by what would hang for ever


def event_of(custom_id: str, **body: Any) -> CloudEvent:
    whole = {"model": "toy", "prompt": "To be", "max_tokens": 4, **body}
    line = {"custom_id": custom_id, "method": "POST", "url": "/v1/completions", "body": whole}
    return request_event("b1", custom_id, "toy", json.dumps(line).encode())


class Sink:
    """Takes results; `answers` are the statuses of the next ones, and after them always the last."""

    def __init__(self) -> None:
        self.answers = [202]
        self.got: list[CloudEvent] = []
        self.taken: list[str] = []  # custom ids
        self.url = ""
        self._changed = asyncio.Event()

    async def take(self, request: web.Request) -> web.Response:
        (event,) = parse(request.headers, await request.read())
        status = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        self.got.append(event)
        if status == 202:
            self.taken.append(event.attributes["customid"])
        self._changed.set()
        return web.Response(status=status)

    async def until(self, met: Callable[[], bool]) -> None:
        async with asyncio.timeout(TIMEOUT_S):
            while not met():
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
async def sink() -> AsyncIterator[Sink]:
    made = Sink()
    app = web.Application()
    app.router.add_post("/", made.take)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    made.url = f"http://127.0.0.1:{runner.addresses[0][1]}/"
    yield made
    await runner.cleanup()


class HeldModel:
    """A Generator that fails with `errors` first, and waits while `open` is not set."""

    ready, context_length, vocab_size = True, 128, 320

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.open = asyncio.Event()
        self.open.set()
        self.begun = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token, None]:
        self.begun += 1
        await self.open.wait()
        if self.errors:
            raise self.errors.pop(0)
        for made in range(1, request.max_tokens + 1):
            yield Token(60 + made, finish="length" if made == request.max_tokens else None)


class Here:
    """A queue in this process; `restart` closes it and opens it again."""

    def __init__(self, folder: Path, file: Path, sink: Sink) -> None:
        self.model = HeldModel()
        self._service = Service(self.model, load_tokenizer(str(folder)), name="toy")
        self._file, self._sink = file, sink

    async def open(self, **limits: int) -> None:
        self.runner = BatchRunner(self._service)
        self.queue = await BatchQueue.open(
            self._file, self._sink.url, self.runner, **{"workers": 2, "requests_max": 100, **limits}
        )

    async def close(self) -> None:
        await self.queue.close()
        await self.runner.close()

    async def put(self, event: CloudEvent) -> None:
        await self.queue.put(event, read_request(event, 1_700_000_000.0))

    def held(self, kind: str) -> int:
        return self.queue._store.depth(kind)


@pytest.fixture
async def here(byte_level_folder: Path, tmp_path: Path, sink: Sink) -> AsyncIterator[Here]:
    made = Here(byte_level_folder, tmp_path / "events.sqlite", sink)
    await made.open()
    yield made
    await made.close()


async def test_results_come_after_the_acknowledgement(here: Here, sink: Sink) -> None:
    here.model.open.clear()
    await here.put(event_of("a"))
    await here.put(event_of("wrong", top_p=7))
    await sink.until(lambda: sink.taken == ["wrong"])
    here.model.open.set()
    await sink.until(lambda: len(sink.taken) == 2)
    lines = [json.loads(event.data or b"") for event in sink.got]
    assert [line["response"]["status_code"] for line in lines] == [400, 200]
    assert lines[1]["response"]["body"]["created"] == 1_700_000_000, "the time of arrival is kept with the request"


async def test_a_request_in_the_file_is_taken_in_once_also_after_a_restart(here: Here, sink: Sink) -> None:
    here.model.open.clear()
    await asyncio.gather(*(here.put(event_of("a")) for _ in range(3)))
    await here.close()
    await here.open()
    await here.put(event_of("a"))
    here.model.open.set()
    await sink.until(lambda: sink.taken == ["a"])
    await here.put(event_of("b"))
    await sink.until(lambda: "b" in sink.taken)
    assert sink.taken == ["a", "b"]


async def test_a_full_file_asks_for_patience(here: Here, sink: Sink) -> None:
    await here.close()
    await here.open(requests_max=2)
    here.model.open.clear()
    await here.put(event_of("a"))
    await here.put(event_of("b"))
    await here.put(event_of("a"))
    with pytest.raises(GenerationError) as caught:
        await here.put(event_of("c"))
    assert (caught.value.status, caught.value.code) == (429, "queue_full")
    assert caught.value.retry_after_s
    here.model.open.set()
    await sink.until(lambda: len(sink.taken) == 2)


async def test_a_sink_that_is_out_of_order_gets_the_same_result_again(here: Here, sink: Sink) -> None:
    sink.answers = [500, 404, 202]
    await here.put(event_of("a"))
    await sink.until(lambda: sink.taken == ["a"])
    assert len({event.to_json() for event in sink.got}) == 1
    assert here.model.begun == 1


async def test_a_result_that_the_sink_refuses_for_good_stays_in_the_file(here: Here, sink: Sink) -> None:
    sink.answers = [400]
    await here.put(event_of("a"))
    async with asyncio.timeout(TIMEOUT_S):
        while not here.held(UNDELIVERED):  # noqa: ASYNC110 (a transaction of another thread)
            await asyncio.sleep(0.01)
    assert here.held(RESULTS) == 0
    assert len(sink.got) == 1


async def test_what_cannot_be_computed_now_is_computed_later(
    here: Here, sink: Sink, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.batch_queue._PAUSES_S", (0, 0))
    here.model.errors = [
        GenerationError("busy", status=429, code="overloaded", retry_after_s=1),
        GenerationError("gone", status=502, code="stage_lost"),
    ]
    await here.put(event_of("a"))
    await sink.until(lambda: sink.taken == ["a"])
    assert json.loads(sink.got[0].data or b"")["response"]["status_code"] == 200
    here.model.errors = [GenerationError("gone", status=502, code="stage_lost") for _ in range(3)]
    await here.put(event_of("b"))
    await sink.until(lambda: len(sink.taken) == 2)
    line = json.loads(sink.got[1].data or b"")
    assert (line["response"], line["error"]) == (None, {"code": "stage_lost", "message": "gone"})


async def test_what_waits_of_a_cancelled_batch_is_not_computed(here: Here, sink: Sink) -> None:
    here.model.open.clear()
    for name in "abcd":
        await here.put(event_of(name))
    async with asyncio.timeout(TIMEOUT_S):
        while here.model.begun < 2:  # noqa: ASYNC110 (what is waited for is another task's doing)
            await asyncio.sleep(0.01)
    here.runner.cancel(cancel_event("b1").attributes["batch"])
    await sink.until(lambda: len(sink.taken) == 4)
    assert {json.loads(event.data or b"")["error"]["code"] for event in sink.got} == {"batch_cancelled"}
    assert here.model.begun == 2


# -- the process


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    def __init__(self, folder: Path, work: Path, sink_url: str) -> None:
        self.file, self.gate, self.log = work / "events.sqlite", work / "gate", work / "log"
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = [sys.executable, "-m", "tests.orchestrator.gated_model", str(folder), str(port)]
        self._environment = {
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[2]),
            "ORCHESTRATOR_EVENTS": "later",
            "ORCHESTRATOR_EVENTS_FILE": str(self.file),
            "ORCHESTRATOR_EVENTS_SINK": sink_url,
        }
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            command = [*self._command, str(self.gate)]
            self.process = warm.Popen(command, env=self._environment, stdout=log, stderr=log)
        return self.process

    async def post(self, client: httpx.AsyncClient, event: CloudEvent) -> int:
        """The status, once the server answers anything but 503."""
        headers, body = to_binary(event)
        async with asyncio.timeout(TIMEOUT_S):
            while True:
                with contextlib.suppress(httpx.TransportError):
                    answer = await client.post(f"{self.url}/events", headers=headers, content=body)
                    if answer.status_code != 503:
                        return answer.status_code
                assert self.process is not None
                assert self.process.poll() is None, self.log.read_text()[-3000:]
                await asyncio.sleep(0.05)


@pytest.fixture
def server(byte_level_folder: Path, tmp_path: Path, sink: Sink) -> Iterator[Server]:
    made = Server(byte_level_folder, tmp_path, sink.url)
    yield made
    if made.process is not None:
        made.process.kill()
        made.process.wait()


async def test_a_killed_server_goes_on_with_what_it_had_acknowledged(server: Server, sink: Sink) -> None:
    """At the kill three requests are computed, of which one result was refused by the sink, and three are not."""
    events = {str(seed): event_of(str(seed), seed=seed, max_tokens=8) for seed in range(6)}
    sink.answers = [202, 202, 503]
    process = server.start()
    async with httpx.AsyncClient(timeout=TIMEOUT_S) as client:
        assert {await server.post(client, event) for event in events.values()} == {202}
        await sink.until(lambda: len(sink.got) >= 3)
        process.kill()
        process.wait()
        sink.answers = [202]
        server.gate.touch()
        process = server.start()
        assert await server.post(client, events["5"]) == 202, "once more: it is still there, or has been sent since"
        await sink.until(lambda: set(sink.taken) == set(events))
        for custom_id in events:
            body = {"model": "toy", "prompt": "To be", "max_tokens": 8, "seed": int(custom_id)}
            asked = (await client.post(f"{server.url}/openai/v1/completions", json=body)).json()
            mine = {event.to_json() for event in sink.got if event.attributes["customid"] == custom_id}
            assert len(mine) == 1, "whoever delivers it, the result is the same"
            line = json.loads(mine.pop())["data"]
            assert line["response"]["body"]["choices"] == asked["choices"]
    process.terminate()
    assert process.wait(30) == 0


def test_a_file_that_is_no_queue_ends_the_server_with_the_reason(server: Server) -> None:
    with contextlib.closing(sqlite3.connect(server.file)) as other:
        other.execute("CREATE TABLE notes (text)")
    before = server.file.read_bytes()
    assert server.start().wait(60) == 2
    said = server.log.read_text()
    assert str(server.file) in said
    assert "Traceback" not in said
    assert server.file.read_bytes() == before
