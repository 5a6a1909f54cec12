"""Requests of batches as events: what is answered, what is a result and what is to be delivered again, and how often a
request is computed that comes more than once."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from jsonschema import Draft202012Validator
from prometheus_client import REGISTRY
from starlette.applications import Starlette

from knative.eventing.event import CloudEvent
from knative.eventing.http_binding import parse, to_binary, to_structured
from orchestrator.batches.events import RESULT, cancel_event, request_event
from orchestrator.choices import Places, Service
from orchestrator.events_api import EventsDoor
from orchestrator.generation import GenerationError, GenerationRequest, Token
from orchestrator.http_guard import HttpGuard
from orchestrator.openai_api import openai_app
from orchestrator.tokenizer import load_tokenizer

BUSY, BREAKS, CRASHES = 5, 6, 8  # as in whole_model.py
COMPLETION = {"model": "toy", "prompt": "To be, or not", "max_tokens": 8}
CHAT = {"model": "toy", "messages": [{"role": "user", "content": "To be?"}], "max_tokens": 6}


def line_of(body: Any, custom_id: str = "a", url: str = "/v1/completions", method: str = "POST") -> bytes:
    return json.dumps({"custom_id": custom_id, "method": method, "url": url, "body": body}).encode()


def event_of(body: Any, custom_id: str = "a", *, batch: str = "b1", **line: str) -> CloudEvent:
    return request_event(batch, custom_id, "toy", line_of(body, custom_id, **line))


def result_of(response: httpx.Response) -> tuple[CloudEvent, dict[str, Any]]:
    """The result event in an answer, and the output line that it carries."""
    assert response.status_code == 200, response.text
    (event,) = parse(dict(response.headers), response.content)
    return event, json.loads(event.data or b"")


# -- over a whole model in a server of its own


@pytest.fixture(scope="module")
def post(live_server: Any) -> Callable[..., httpx.Response]:
    def send(event: CloudEvent, binding: Any = to_binary) -> httpx.Response:
        headers, body = binding(event)
        return httpx.post(f"{live_server.url}/events", headers=headers, content=body)

    return send


@pytest.mark.parametrize("binding", [to_binary, to_structured], ids=["binary", "structured"])
@pytest.mark.parametrize(
    ("path", "body"), [("completions", COMPLETION), ("chat/completions", CHAT)], ids=["completions", "chat"]
)
def test_the_answer_is_that_of_the_endpoint(
    live_server: Any, post: Any, binding: Any, path: str, body: dict[str, Any]
) -> None:
    body = {**body, "n": 2, "logprobs": True if path == "chat/completions" else 2, "seed": 3}
    expected = httpx.post(f"{live_server.openai_url}/{path}", json=body).json()
    event = event_of(body, f'{path} ünï "%41"', url=f"/v1/{path}").changed({"time": "2026-01-02T03:04:05.6Z"})
    result, line = result_of(post(event, binding))
    answer = line["response"].pop("body")
    assert answer.pop("id").startswith(expected.pop("id").partition("-")[0] + "-")
    assert answer.pop("created") == 1767323045
    del expected["created"]
    assert answer == expected
    request_id = line["response"].pop("request_id")
    assert line == {
        "id": f"batch_{request_id}",
        "custom_id": f'{path} ünï "%41"',
        "response": {"status_code": 200},
        "error": None,
    }
    assert dict(result.attributes) == {
        "specversion": "1.0",
        "type": RESULT,
        "id": f"{event.id}.result",
        "source": "/stagecraft/toy",
        "datacontenttype": "application/json",
        "batch": "b1",
        "customid": f'{path} ünï "%41"',
        "requestid": event.id,
    }


WRONG: dict[str, tuple[dict[str, Any], dict[str, str], int, str]] = {
    "unknown url": (COMPLETION, {"url": "/v1/embeddings"}, 400, "invalid_url"),
    "method": (COMPLETION, {"method": "GET"}, 400, "invalid_method"),
    "parameter": ({**COMPLETION, "colour": 1}, {}, 400, "unknown_parameter"),
    "value": ({**COMPLETION, "temperature": -1}, {}, 400, "invalid_value"),
    "stream": ({**COMPLETION, "stream": True}, {}, 400, "unsupported_parameter"),
    "too long": ({**COMPLETION, "prompt": [9] * 128}, {}, 400, "context_length_exceeded"),
    "another model": ({**COMPLETION, "model": "other"}, {}, 404, "model_not_found"),
    "seed of no number": ({**COMPLETION, "seed": "x"}, {}, 400, "invalid_value"),
}


@pytest.mark.parametrize(("body", "line", "status", "code"), WRONG.values(), ids=WRONG)
def test_a_request_that_is_wrong_in_itself_has_a_result(
    post: Any, body: dict[str, Any], line: dict[str, str], status: int, code: str
) -> None:
    _, output = result_of(post(event_of(body, code, **line)))
    assert output["response"]["status_code"] == status
    assert output["response"]["body"]["error"]["code"] == code
    assert output["custom_id"] == code
    assert output["error"] is None


def test_a_body_that_is_no_object_has_a_result(post: Any) -> None:
    _, output = result_of(post(event_of([1], "list")))
    assert output["response"]["body"]["error"]["message"] == "body must be a JSON object, got [1]"


UNREADABLE: dict[str, tuple[dict[str, str], bytes, str]] = {
    "no event": ({}, line_of(COMPLETION), "no header ce-id"),
    "no JSON": ({"ce-id": "1"}, b"{", "data of the event cannot be read"),
    "no data": ({"ce-id": "1"}, b"", "data of the event cannot be read"),
    "a list": ({"ce-id": "1"}, b"[]", "must be a JSON object"),
    "no custom_id": ({"ce-id": "1"}, b'{"url": "/v1/completions"}', "needs a custom_id"),
    "long custom_id": ({"ce-id": "1"}, line_of(COMPLETION, "x" * 257), "1 to 256 characters"),
    "custom_id of no header": ({"ce-id": "1"}, line_of(COMPLETION, "a\nb"), "U\\+000A"),
    "another type": ({"ce-id": "1", "ce-type": "com.example.order"}, b"{}", "known are dev.stagecraft.batch.request"),
    "cancel of nothing": ({"ce-id": "1", "ce-type": "dev.stagecraft.batch.cancel.v1"}, b"{}", '{"batch": ID}'),
    "two events": ({"content-type": "application/cloudevents-batch+json"}, b"[]", "holds 0 events"),
}


@pytest.mark.parametrize(("headers", "body", "words"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_event_that_cannot_be_understood_is_refused(
    live_server: Any, headers: dict[str, str], body: bytes, words: str
) -> None:
    attributes = {"ce-specversion": "1.0", "ce-type": "dev.stagecraft.batch.request.v1", "ce-source": "/me"}
    response = httpx.post(f"{live_server.url}/events", headers={**attributes, **headers}, content=body)
    assert response.status_code == 400
    assert words.replace("\\+", "+") in response.json()["error"]


@pytest.mark.parametrize(
    ("first_token", "status", "retry_after"), [(BUSY, 429, "7"), (BREAKS, 502, None), (CRASHES, 500, None)]
)
def test_what_may_heal_is_to_be_delivered_again(
    post: Any, first_token: int, status: int, retry_after: str | None
) -> None:
    response = post(event_of({**COMPLETION, "prompt": [first_token]}, f"heals {first_token}"))
    assert response.status_code == status
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text


def test_metrics_and_log_tell_of_each_request(live_server: Any, post: Any) -> None:
    before = live_server.metric("stagecraft_batch_requests_total")
    event = event_of({**COMPLETION, "max_tokens": 2}, "logged")
    post(event)
    post(event_of({**COMPLETION, "top_p": 7}, "not generated"))
    assert live_server.metric("stagecraft_batch_requests_total") == before + 2
    assert live_server.metric("stagecraft_batch_requests_in_flight") == 0
    lines = [json.loads(line) for line in live_server.log.read_text().splitlines() if '"custom_id"' in line]
    (done,) = [line for line in lines if line["custom_id"] == "logged"]
    assert (done["endpoint"], done["outcome"], done["batch"], done["event_id"]) == ("batch", "ok", "b1", event.id)
    (refused,) = [line for line in lines if line["custom_id"] == "not generated"]
    assert "top_p" in refused["error"]


# -- in this process, where the generator can be held


class HeldModel:
    """A Generator whose tokens hang on prompt and seed alone. Prompts wait while `open` is not set."""

    context_length, vocab_size = 128, 320

    def __init__(self) -> None:
        self.ready = True
        self.begun: list[GenerationRequest] = []
        self.open = asyncio.Event()
        self.ended = 0

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Token, None]:
        self.begun.append(request)
        try:
            await self.open.wait()
            for made in range(1, request.max_tokens + 1):
                await asyncio.sleep(0)
                token = zlib.crc32(repr((request.prompt, request.params, made)).encode()) % 250 + 60
                yield Token(token, finish="length" if made == request.max_tokens else None)
        finally:
            self.ended += 1

    async def until_begun(self, count: int) -> None:
        async with asyncio.timeout(10):
            while len(self.begun) < count:  # noqa: ASYNC110 (what is waited for is another task's doing)
                await asyncio.sleep(0)


class Here:
    """The door, with the OpenAI endpoints beside it and the guard before it."""

    def __init__(self, folder: Path, **limits: int) -> None:
        self.model = HeldModel()
        service = Service(self.model, load_tokenizer(str(folder)), name="toy", **limits)
        self.door = EventsDoor(service)
        app = Starlette(routes=[self.door.route])
        app.mount("/openai/v1", openai_app(service))
        guarded = HttpGuard(
            app, body_bytes_max=10_000, json_depth_max=64, error_body=lambda path, error: {"error": str(error)}
        )
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(guarded), base_url="http://here")

    def send(self, event: CloudEvent) -> asyncio.Task[httpx.Response]:
        headers, body = to_binary(event)
        return asyncio.create_task(self.client.post("/events", headers=headers, content=body))

    async def close(self) -> None:
        await self.door.close()
        await self.client.aclose()


@pytest.fixture
async def here(byte_level_folder: Path) -> AsyncIterator[Callable[..., Here]]:
    made: list[Here] = []

    def make(**limits: int) -> Here:
        made.append(Here(byte_level_folder, **limits))
        return made[-1]

    yield make
    for each in made:
        await each.close()


async def test_deliveries_at_the_same_time_share_one_generation(here: Any) -> None:
    at = here()
    deliveries = [at.send(event_of(COMPLETION)) for _ in range(3)]
    other = at.send(event_of(COMPLETION, batch="b2"))
    await at.model.until_begun(2)
    at.model.open.set()
    answers = [await delivery for delivery in deliveries]
    assert len({(answer.content, str(sorted(answer.headers.items()))) for answer in answers}) == 1
    assert result_of(await other)[0].id != result_of(answers[0])[0].id
    assert len(at.model.begun) == 2


async def test_another_process_makes_the_same_result_without_a_seed(here: Any) -> None:
    event = event_of({**COMPLETION, "temperature": 1}).changed({"knativearrivaltime": "2026-01-02T03:04:05Z"})
    bodies, seeds = [], []
    for sent in (event, event, event.changed({"id": "another"})):
        at = here()
        at.model.open.set()
        bodies.append((await at.send(sent)).content)
        seeds.append(at.model.begun[0].params.seed)
    assert bodies[0] == bodies[1] != bodies[2]
    assert seeds[0] == seeds[1] != seeds[2]
    assert json.loads(bodies[0])["response"]["body"]["created"] == 1767323045


async def test_a_seed_that_was_given_is_used(here: Any) -> None:
    at = here()
    at.model.open.set()
    await at.send(event_of({**COMPLETION, "seed": 42}))
    assert at.model.begun[0].params.seed == 42
    assert at.model.begun[0].priority == "batch"


async def test_a_generation_goes_on_when_its_delivery_is_cut_off(here: Any) -> None:
    at = here()
    cut_off = at.send(event_of(COMPLETION))
    await at.model.until_begun(1)
    cut_off.cancel()
    await asyncio.gather(cut_off, return_exceptions=True)
    assert at.model.ended == 0
    again = at.send(event_of(COMPLETION))
    await asyncio.sleep(0)
    at.model.open.set()
    assert result_of(await again)[1]["response"]["status_code"] == 200
    once_more = result_of(await at.send(event_of(COMPLETION)))
    assert once_more == result_of(await again)
    assert len(at.model.begun) == 1


async def test_batches_have_their_own_bound_and_leave_others_theirs(here: Any) -> None:
    at = here(batch_requests_max=2, requests_max=1)
    running = [at.send(event_of(COMPLETION, name)) for name in "ab"]
    await at.model.until_begun(2)
    refused = await at.send(event_of(COMPLETION, "c"))
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    interactive = asyncio.create_task(at.client.post("/openai/v1/completions", json=COMPLETION))
    await at.model.until_begun(3)
    assert [request.priority for request in at.model.begun] == ["batch", "batch", "interactive"]
    at.model.open.set()
    assert (await interactive).status_code == 200
    for delivery in running:
        result_of(await delivery)
    result_of(await at.send(event_of(COMPLETION, "c")))


def test_retry_after_is_the_time_until_a_place_is_free_on_average() -> None:
    places = Places(2)
    for _ in range(100):
        places.take()
        places.free(duration_s=30)
    places.take()
    places.take()
    with pytest.raises(GenerationError) as caught:
        places.take()
    assert caught.value.retry_after_s in (15, 16)


async def test_a_model_that_is_not_ready_asks_for_patience(here: Any) -> None:
    at = here()
    at.model.ready = False
    response = await at.send(event_of(COMPLETION))
    assert (response.status_code, response.headers["retry-after"]) == (503, "2")
    at.model.ready = True
    at.model.open.set()
    result_of(await at.send(event_of(COMPLETION)))


async def test_a_cancelled_batch_gets_results_that_say_so(here: Any) -> None:
    at = here()
    at_work = at.send(event_of(COMPLETION))
    of_another = at.send(event_of(COMPLETION, batch="b2"))
    await at.model.until_begun(2)
    cancelled = await at.send(cancel_event("b1"))
    assert (cancelled.status_code, cancelled.content) == (202, b"")
    for delivery in (at_work, at.send(event_of(COMPLETION, "sent later"))):
        _, line = result_of(await delivery)
        assert line["response"] is None
        assert line["error"] == {"code": "batch_cancelled", "message": "the batch b1 was cancelled"}
    at.model.open.set()
    assert result_of(await of_another)[1]["error"] is None
    assert len(at.model.begun) == at.model.ended == 2


async def test_events_of_batches_are_as_the_schema_and_the_page_say(here: Any, root: Path) -> None:
    schema = json.loads((root / "docs" / "events.schema.json").read_text())
    at = here()
    at.model.open.set()
    asked = [event_of(COMPLETION), event_of({}, "wrong"), cancel_event("b2"), event_of(COMPLETION, batch="b2")]
    answers = [await at.send(event) for event in asked]
    results = [result_of(answers[index])[0] for index in (0, 1, 3)]
    page = (root / "docs" / "events.md").read_text()
    for event in (*asked, *results):
        described = {**event.attributes, "data": json.loads(event.data or b"")}
        Draft202012Validator(schema).validate(described)
        assert event.type in page
        assert not Draft202012Validator(schema).is_valid({**described, "data": {}})


async def test_output_lines_are_those_of_openai(here: Any) -> None:
    specs = Path(__file__).parents[3] / "shared" / "specs" / "openai" / "batch-lines.yaml"
    if not specs.exists():
        pytest.skip(f"{specs} is not there")
    schema = yaml.safe_load(specs.read_text())["components"]["schemas"]["BatchRequestOutput"]["properties"]
    at = here()
    at.model.open.set()
    _, line = result_of(await at.send(event_of(COMPLETION)))
    assert set(line) == set(schema)
    assert set(line["response"]) == set(schema["response"]["properties"])
    await at.send(cancel_event("b2"))
    _, line = result_of(await at.send(event_of(COMPLETION, batch="b2")))
    assert set(line["error"]) == set(schema["error"]["properties"])


async def test_the_end_of_the_server_is_no_result(here: Any) -> None:
    at = here()
    at_work = at.send(event_of(COMPLETION))
    await at.model.until_begun(1)
    await at.door.close()
    response = await at_work
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert at.model.ended == 1


async def test_a_body_over_the_limit_is_refused_while_it_is_read(here: Any) -> None:
    assert (await here().send(event_of({**COMPLETION, "prompt": "x" * 20_000}))).status_code == 413


async def test_outcomes_are_counted(here: Any) -> None:
    def count(outcome: str) -> float:
        labels = {"model": "toy", "outcome": outcome}
        return REGISTRY.get_sample_value("stagecraft_batch_requests_total", labels) or 0.0

    outcomes = ("ok", "duplicate", "failed", "later", "cancelled", "invalid")
    before = {outcome: count(outcome) for outcome in outcomes}
    at = here()
    at.model.open.set()
    await at.send(event_of(COMPLETION))
    await at.send(event_of(COMPLETION))
    await at.send(event_of({}, "wrong"))
    at.model.ready = False
    await at.send(event_of(COMPLETION, "too early"))
    await at.send(cancel_event("b1"))
    await at.send(event_of(COMPLETION, "too late"))
    await at.send(event_of(COMPLETION).changed({"type": "x"}))
    assert {outcome: count(outcome) - before[outcome] for outcome in outcomes} == dict.fromkeys(outcomes, 1)


def test_errors_that_are_answers_are_told_from_those_that_may_heal() -> None:
    from orchestrator.batch_requests import is_result

    final = {status for status in range(400, 600) if is_result(GenerationError("", status=status, code=""))}
    assert final == set(range(400, 500)) - {408, 409, 429}
