"""CloudEvents in all their modes, as brokers, the orchestrator's event door and the results service read them; and what
a stage answers, as the orchestrator reads it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from random import Random
from typing import Any

import aiohttp

from functions.contract import events
from functions.contract.errors import InvalidEvent as InvalidStageEvent
from functions.contract.errors import StageError, WrongPosition
from functions.contract.events import Event
from functions.contract.messages import Sampled, Samples
from knative.errors import KnativeError
from knative.eventing.broker import arrived
from knative.eventing.event import CloudEvent, InvalidEvent
from knative.eventing.http_binding import parse, to_binary, to_structured
from knative.eventing.stored import to_store
from orchestrator.batch_requests import check_known, question, read_cancel, read_request
from orchestrator.batches.events import CANCEL, REQUEST, RESULT
from orchestrator.batches.results_api import item_of, items_of_dead_letter
from orchestrator.generation import GenerationError
from orchestrator.stage_client import StageClient, StageUnreachable
from tools.fuzzing.door import Verdict, Violation
from tools.fuzzing.http_text import Request, mutated_request
from tools.fuzzing.mutations import mutated, mutated_json
from tools.fuzzing.tensors import mutated_tensors

_LINE = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"model": "m", "prompt": "To be"}}
_OUTPUT = {"id": "x", "custom_id": "a", "response": {"status_code": 200, "body": {}}, "error": None}
_NAMES = tuple(f"ce-{name}" for name in ("id", "type", "source", "specversion", "time", "subject", "dataschema", "data",
               "datacontenttype", "knativebrokerttl", "batch", "customid", "knativeerrordata"))  # fmt: skip


class BrokerDoor:
    """The binding itself and everything pure behind it: into a broker, out in both modes, and to those who read it."""

    name = "broker-events"

    def __init__(self) -> None:
        self._good = _events()

    def make(self, random: Random) -> bytes:
        request = random.choice(self._good)
        kind = random.randrange(10)
        if kind < 4:
            request = mutated_request(random, request, _NAMES)
        elif kind < 9:
            request = replace(request, body=mutated_json(random, json.loads(request.body)))
        else:
            request = replace(request, body=mutated(random, request.body))
        return request.to_bytes()

    def take(self, data: bytes) -> Verdict:
        request = Request.from_bytes(data)
        headers = _joined(request.headers)
        try:
            taken = arrived(parse(headers, request.body))
        except KnativeError as error:
            if not 400 <= error.status < 500 or not str(error):
                raise Violation("5xx", f"{error.status}: {error}") from error
            return "refused"
        for event in taken:
            to_store(event, "default/b", ["default/t"])
            for form in (to_binary, to_structured):
                (again,) = parse(*form(event))
                if _data(again) != _data(event) or dict(again.attributes) != dict(event.attributes):
                    raise Violation("harm", f"{form.__name__} changes the event: {event} is then {again}")
            _read_by_all(event)
        return "accepted"

    def check(self) -> None:
        for request in self._good:
            if self.take(request.to_bytes()) != "accepted":
                raise Violation("harm", f"a good event is refused: {request}")

    def close(self) -> None:
        """Nothing is open."""


def _data(event: CloudEvent) -> bytes | None:
    """Space about a JSON value is no part of it, and structured mode has no place for it."""
    if event.data is None or "json" not in event.attributes.get("datacontenttype", ""):
        return event.data
    return event.data.strip(b" \t\r\n")


def _read_by_all(event: Any) -> None:
    """Whoever an event may come to says what it is, or that it is none of theirs."""
    for read in (_as_request, lambda e: read_cancel(e), item_of, items_of_dead_letter):
        try:
            read(event)
        except (InvalidEvent, GenerationError):
            continue


def _as_request(event: Any) -> None:
    check_known(event)
    question(read_request(event, 0.0))


def _joined(headers: Sequence[tuple[str, str]]) -> Mapping[str, str]:
    found: dict[str, str] = {}
    for name, value in headers:
        found[name] = value
    return found


def _events() -> list[Request]:
    found = []
    for kind, data in ((REQUEST, _LINE), (CANCEL, {"batch": "b"}), (RESULT, _OUTPUT)):
        attributes: dict[str, Any] = {
            "specversion": "1.0", "type": kind, "source": "/b", "id": "1", "batch": "b", "customid": "a",
            "time": "2026-11-28T00:00:00Z", "subject": "s", "knativebrokerttl": "5",
        }  # fmt: skip
        headers = (("content-type", "application/json"), *((f"ce-{name}", value) for name, value in attributes.items()))
        found.append(Request("POST", "/", headers, json.dumps(data).encode()))
        whole = {**attributes, "knativebrokerttl": 5, "flag": True, "datacontenttype": "application/json", "data": data}
        structured = (("content-type", "application/cloudevents+json; charset=utf-8"),)
        found.append(Request("POST", "/", structured, json.dumps(whole).encode()))
        text = {**attributes, "datacontenttype": "text/plain", "data": "é"}
        coded = {**attributes, "datacontenttype": "application/octet-stream", "data_base64": "AAEC"}
        batch = (("content-type", "application/cloudevents-batch+json"),)
        found.append(Request("POST", "/", batch, json.dumps([whole, text, coded]).encode()))
    return found


# -- replies of stages


class ReplyDoor:
    """A server that answers the orchestrator's own client with whatever the input is, over a real socket."""

    name = "stage-replies"
    _TIMEOUT_S = 30.0  # only what is announced and never comes takes so long, and the server hangs up before

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._failures: list[str] = []
        self._loop.set_exception_handler(lambda loop, context: self._failures.append(str(context)))
        self._answer = b""
        self._good = _replies()
        self._loop.run_until_complete(self._open())

    def make(self, random: Random) -> bytes:
        reply = random.choice(self._good)
        head, _, body = reply.partition(b"\r\n\r\n")
        kind = random.randrange(10)
        if kind < 3:
            return mutated(
                random, reply, [b"\r\n", b"\r\n\r\n", b"transfer-encoding: chunked\r\n", b"HTTP/1.0", b"100"]
            )
        if kind == 3:
            return mutated(random, head) + b"\r\n\r\n" + body
        changed = mutated_json(random, json.loads(body)) if body[:1] == b"{" else mutated_tensors(random, body)
        if kind < 9:  # with a length that fits
            head = b"\r\n".join(line for line in head.split(b"\r\n") if not line.startswith(b"content-length"))
            head += b"\r\ncontent-length: %d" % len(changed)
        return head + b"\r\n\r\n" + changed

    def take(self, data: bytes) -> Verdict:
        self._answer = data
        verdict = self._loop.run_until_complete(self._take(data))
        if self._failures:
            raise Violation("crash", f"left to the event loop: {self._failures.pop()}")
        return verdict

    def check(self) -> None:
        for reply in self._good:
            wanted = "refused" if events.ERROR.encode() in reply else "accepted"
            if self.take(reply) != wanted:
                raise Violation("harm", f"a good reply is not {wanted}: {reply[:200]!r}")

    def close(self) -> None:
        self._loop.run_until_complete(self._close())
        self._loop.close()

    async def _take(self, data: bytes) -> Verdict:
        try:
            if events.WOKEN.encode() in data:
                info = await self._client.wake(self._TIMEOUT_S, self._url)
                info.kv_tokens_free  # noqa: B018 (which computes with what the reply says)
            elif events.RELEASED.encode() in data:
                await self._client.release(b'{"sequences": [1]}', self._url, self._TIMEOUT_S)
            else:
                Samples.from_body((await self._client.step(b"x", "0", self._url, self._TIMEOUT_S)).data)
        except (StageUnreachable, StageError, InvalidStageEvent) as error:
            if not str(error):
                raise Violation("crash", f"{type(error).__name__} says nothing") from error
            return "refused"
        return "accepted"

    async def _open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        port = self._server.sockets[0].getsockname()[1]
        self._url = f"http://127.0.0.1:{port}/"
        self._session = aiohttp.ClientSession()
        self._client = StageClient(self._session, 1, self._url, "0123456789abcdef")

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One reply a connection, which then ends: what is missing of a reply never comes."""
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            size = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(size)
            writer.write(self._answer)
            await writer.drain()
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def _close(self) -> None:
        self._client.close()
        await self._session.close()
        self._server.close()
        await self._server.wait_closed()


def _replies() -> list[bytes]:
    info = {
        "model": "tiny", "plan": "0123456789abcdef", "stage": 1, "stages": 2, "blocks": [2, 4],
        "replica": "127.0.0.1:1",
        "dtype": "float32", "device": "cpu", "hidden_size": 16, "vocab_size": 257, "max_positions": 96,
        "kv_bytes_per_token": 128, "kv_bytes_max": 1048576, "kv_bytes_used": 0, "weight_bytes": 1, "sequences": 0,
    }  # fmt: skip
    sampled = Samples((Sampled(7, 3, 5), Sampled(9, 4, 6, -0.5, ((6, -0.5), (1, -1.5)))))
    wrong = WrongPosition("a gap", {7: 3}).to_json()
    return [
        _reply(200, events.WOKEN, events.JSON, json.dumps(info).encode()),
        _reply(200, events.STEPPED, events.TENSORS, b"".join(sampled.to_body())),
        _reply(200, events.RELEASED, events.JSON, b'{"released": [1]}'),
        _reply(409, events.ERROR, events.JSON, json.dumps(wrong).encode()),
        _reply(429, events.ERROR, events.JSON, b'{"code": "kv_exhausted", "message": "full", "retriable": true}'),
    ]


def _reply(status: int, kind: str, content_type: str, body: bytes) -> bytes:
    event = Event(kind, "/elsewhere/tiny/stages/1/x", "1.reply", content_type, body, {"replica": "x", "computeus": "5"})
    headers, _ = events.to_http(event)
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in headers.items())]
    return "\r\n".join([*lines, f"content-length: {len(body)}", "", ""]).encode() + body
