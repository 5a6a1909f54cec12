"""What becomes of a request: repeated by its key, over its time, cut off by either end, over real stage processes."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.exactness.orchestrators import NAME, Orchestrator

PLAN = "life-plan"
HALVES = ["0:2", "2:4"]
ENDLESS = 4000  # more tokens than any test waits for
PROMPT = [20, 21, 22]
SAMPLED = {"temperature": 1, "max_tokens": 16, "ignore_eos": True}
LIMITS = {"LANES_MAX": "1", "LANE_WIDTH": "4", "STEP_TOKENS_MAX": "16", "REQUESTS_MAX": "8"}


@pytest.fixture(scope="module")
def stage_urls(talkative: Path, running_stages: Any) -> Iterator[list[str]]:
    with running_stages(talkative, HALVES, STAGE_PLAN=PLAN) as stages:
        yield stages.urls


@pytest.fixture
def other_stage_urls(talkative: Path, running_stages: Any) -> Iterator[list[str]]:
    """For a test that leaves sequences in them."""
    with running_stages(talkative, HALVES, STAGE_PLAN=PLAN) as stages:
        yield stages.urls


@pytest.fixture(scope="module")
def new_orchestrator(
    talkative: Path, stage_urls: list[str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[..., Orchestrator]]:
    """(NAME=value...) -> a running orchestrator over the module's stages, or others; ended with the module."""
    started: list[Orchestrator] = []

    def start(stage_urls: list[str] = stage_urls, **settings: str) -> Orchestrator:
        log = tmp_path_factory.mktemp("orchestrator") / "log"
        started.append(Orchestrator(talkative, PLAN, stage_urls, log, {**LIMITS, **settings}))
        started[-1].start()
        return started[-1]

    yield start
    for orchestrator in started:
        orchestrator.close()


@pytest.fixture(scope="module")
def running(new_orchestrator: Callable[..., Orchestrator]) -> Orchestrator:
    return new_orchestrator()


def completion(**options: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": NAME, "prompt": PROMPT, **SAMPLED, "return_token_ids": True, **options}
    return "/openai/v1/completions", body


def chat(**options: Any) -> tuple[str, dict[str, Any]]:
    body = {"model": NAME, "messages": [{"role": "user", "content": "To be?"}], **SAMPLED, **options}
    return "/openai/v1/chat/completions", body


def predict(**options: Any) -> tuple[str, dict[str, Any]]:
    body = {"instances": ["To be", "To be"], "parameters": {**SAMPLED, **options}}
    return f"/v1/models/{NAME}:predict", body


def infer(**options: Any) -> tuple[str, dict[str, Any]]:
    tensor = {"name": "text_input", "shape": [1], "datatype": "BYTES", "data": ["To be"]}
    return f"/v2/models/{NAME}/infer", {"inputs": [tensor], "parameters": {**SAMPLED, **options}}


def generate(**options: Any) -> tuple[str, dict[str, Any]]:
    return f"/v2/models/{NAME}/generate", {"text_input": "To be", "parameters": {**SAMPLED, **options}}


def generate_stream(**options: Any) -> tuple[str, dict[str, Any]]:
    path, body = generate(**options)
    return f"{path}_stream", body


WHOLE: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
    "completion": completion, "chat": chat, "v1": predict, "v2": infer, "generate": generate
}  # fmt: skip
STREAMED: dict[str, Callable[..., tuple[str, dict[str, Any]]]] = {
    "completion stream": lambda **options: completion(stream=True, **options),
    "chat stream": lambda **options: chat(stream=True, n=2, **options),
    "generate_stream": generate_stream,
}
ALL = {**WHOLE, **STREAMED}


def post(orchestrator: Orchestrator, asked: tuple[str, dict[str, Any]], **headers: str) -> httpx.Response:
    path, body = asked
    given = {name.replace("_", "-"): value for name, value in headers.items()}
    return httpx.post(orchestrator.url + path, json=body, headers=given, timeout=120)


def ids_of(text: str) -> list[int]:
    """The token ids in the events of a streamed completion."""
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: {")]
    return [token for line in lines for choice in json.loads(line).get("choices", ()) for token in choice["token_ids"]]


def read_some(orchestrator: Orchestrator, key: str, events: int, asked: tuple[str, dict[str, Any]]) -> str:
    """The first events of a stream, which is left then."""
    path, body = asked
    text = ""
    with httpx.stream(
        "POST", orchestrator.url + path, json=body, headers={"idempotency-key": key}, timeout=120
    ) as reply:
        for part in reply.iter_text():
            text += part
            if text.count("\n\n") >= events:
                return text
    pytest.fail("the stream ended by itself")


def read_until_lost(
    orchestrator: Orchestrator, key: str, events: int, asked: tuple[str, dict[str, Any]], received: list[str]
) -> None:
    """Reads a stream, and kills who sends it after some events."""
    path, body = asked
    killed = False
    with httpx.stream(
        "POST", orchestrator.url + path, json=body, headers={"idempotency-key": key}, timeout=120
    ) as reply:
        for part in reply.iter_text():
            received.append(part)
            if not killed and "".join(received).count("\n\n") >= events:
                killed = True
                orchestrator.end(signal.SIGKILL)


# -- keys


@pytest.mark.parametrize("way", ALL)
def test_a_key_repeats_its_answer_and_computes_nothing_anew(running: Orchestrator, way: str) -> None:
    first = post(running, ALL[way](), idempotency_key=f"repeat {way}")
    assert (first.status_code, "idempotency-replayed" in first.headers) == (200, False), first.text
    before = running.tokens()
    again = post(running, ALL[way](), idempotency_key=f'"repeat {way}"')
    assert (again.status_code, again.headers["idempotency-replayed"]) == (200, "true")
    assert again.text == first.text
    assert running.tokens() == before
    other_body = post(running, ALL[way](max_tokens=15), idempotency_key=f"repeat {way}")
    assert other_body.status_code == 422
    assert "Idempotency-Key" in other_body.text
    other_key = post(running, ALL[way](), idempotency_key=f"another {way}")
    assert other_key.text != first.text, "the text was not drawn"
    other_sender = post(running, ALL[way](), idempotency_key=f"repeat {way}", authorization="Bearer other")
    assert "idempotency-replayed" not in other_sender.headers
    assert other_sender.text not in (first.text, other_key.text)


async def test_a_key_repeats_its_answer_over_grpc(running: Orchestrator) -> None:
    from grpc.aio import AioRpcError
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    def request(**parameters: Any) -> InferRequest:
        tensor = InferInput("input_ids", [1, len(PROMPT)], "INT64", data=PROMPT)
        given = {**SAMPLED, "temperature": "1", **parameters}
        return InferRequest(NAME, [tensor], parameters=given)

    async with InferenceGRPCClient(f"127.0.0.1:{running.ports[1]}") as client:
        first, second = request(), request()
        second.id = first.id
        texts = []
        for asked in (first, second):
            reply = await client.infer(asked, headers=[("idempotency-key", "grpc")])
            texts.append([output.as_numpy().tolist() for output in reply.outputs])
        assert texts[0] == texts[1]
        other = request(max_tokens=3)
        other.id = first.id
        with pytest.raises(AioRpcError, match="Idempotency-Key"):
            await client.infer(other, headers=[("idempotency-key", "grpc")])


@pytest.mark.parametrize("way", ALL)
def test_headers_that_cannot_be_used_are_refused(running: Orchestrator, way: str) -> None:
    assert post(running, ALL[way](), idempotency_key="k" * 256).status_code == 400
    assert post(running, ALL[way](), x_request_timeout_ms="soon").status_code == 400


def test_a_client_that_was_cut_off_gets_its_text_from_the_beginning(running: Orchestrator) -> None:
    running.until_idle()
    before = running.tokens()
    asked = completion(stream=True, max_tokens=300)
    begun = read_some(running, "cut off", 5, asked)
    whole = post(running, asked, idempotency_key="cut off")
    assert whole.text.startswith(begun)
    assert whole.text.endswith("data: [DONE]\n\n")
    assert len(ids_of(whole.text)) == 300
    assert running.tokens() - before == len(PROMPT) + 300 - 1, "something was computed twice"


def test_a_key_leads_to_the_same_text_after_the_orchestrator_was_lost(
    new_orchestrator: Callable[..., Orchestrator], other_stage_urls: list[str]
) -> None:
    orchestrator = new_orchestrator(other_stage_urls)
    asked = completion(stream=True, max_tokens=300)
    received: list[str] = []
    with pytest.raises(httpx.RemoteProtocolError):
        read_until_lost(orchestrator, "lost", 5, asked, received)
    text = "".join(received)
    begun = ids_of(text[: text.rindex("\n\n")])
    assert 5 <= len(begun) < 300
    orchestrator.start()
    whole = post(orchestrator, asked, idempotency_key="lost")
    assert ids_of(whole.text)[: len(begun)] == begun
    assert len(ids_of(whole.text)) == 300
    ids = [json.loads(part.splitlines()[0].removeprefix("data: "))["id"] for part in (text, whole.text)]
    assert ids[0] == ids[1]
    seed = whole.headers["x-stagecraft-seed"]
    with_seed = post(orchestrator, completion(stream=True, max_tokens=300, seed=int(seed)))
    assert ids_of(with_seed.text) == ids_of(whole.text)
    orchestrator.end(signal.SIGTERM)


# -- the end of the process


@pytest.fixture(scope="module")
def last_words(new_orchestrator: Callable[..., Orchestrator]) -> dict[str, Any]:
    """What requests that are under way hear when the process is told to end before they can."""
    from grpc.aio import AioRpcError
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    orchestrator = new_orchestrator(GRACE_S="1", LANE_WIDTH="8", IDEMPOTENCY_LINGER_S="600")

    async def ask(client: httpx.AsyncClient, way: str) -> httpx.Response:
        path, body = ALL[way](max_tokens=ENDLESS)
        return await client.post(orchestrator.url + path, json=body)

    async def over_grpc() -> Any:
        tensor = InferInput("input_ids", [1, len(PROMPT)], "INT64", data=PROMPT)
        request = InferRequest(NAME, [tensor], parameters={"max_tokens": ENDLESS, "ignore_eos": True})
        async with InferenceGRPCClient(f"127.0.0.1:{orchestrator.ports[1]}") as client:
            try:
                await client.infer(request)
            except AioRpcError as error:
                return error.code().name

    async def all_at_once() -> dict[str, Any]:
        async with httpx.AsyncClient(timeout=120) as client:
            ways = ("v1", "completion", *STREAMED)
            tasks: dict[str, asyncio.Task[Any]] = {way: asyncio.create_task(ask(client, way)) for way in ways}
            tasks["grpc"] = asyncio.create_task(over_grpc())
            await asyncio.to_thread(orchestrator.wait, lambda: orchestrator.sequences() == [8.0, 8.0])
            assert await asyncio.to_thread(orchestrator.end, signal.SIGTERM) == 0
            return dict(zip(tasks, await asyncio.gather(*tasks.values()), strict=True))

    return asyncio.run(all_at_once())


@pytest.mark.parametrize("way", ["v1", "completion"])
def test_a_request_that_cannot_end_in_time_gets_an_error(last_words: dict[str, Any], way: str) -> None:
    reply = last_words[way]
    assert (reply.status_code, reply.headers["retry-after"]) == (503, "1")
    assert "shutting down" in reply.text


@pytest.mark.parametrize("way", STREAMED)
def test_a_stream_that_cannot_end_in_time_ends_with_an_error(last_words: dict[str, Any], way: str) -> None:
    """A body that was cut would have raised an error where it was read."""
    reply = last_words[way]
    assert reply.status_code == 200
    *_, last = reply.text.removesuffix("\n\n").split("\n\n")
    error = json.loads(last.removeprefix("data: "))["error"]
    assert "shutting down" in (error if way == "generate_stream" else error["message"])
    if way != "generate_stream":
        assert error["code"] == "shutting_down"


def test_a_grpc_call_that_cannot_end_in_time_gets_an_error(last_words: dict[str, Any]) -> None:
    assert last_words["grpc"] == "UNAVAILABLE"


def test_nothing_is_left_in_the_stages(last_words: dict[str, Any], running: Orchestrator) -> None:
    running.until_idle()


# -- deadlines


@pytest.mark.parametrize("way", WHOLE)
def test_past_its_deadline_a_request_is_given_up(running: Orchestrator, way: str) -> None:
    running.until_idle()
    before = running.tokens()
    reply = post(running, ALL[way](max_tokens=ENDLESS), x_request_timeout_ms="200")
    assert reply.status_code == 504
    assert "time that the request was given is over" in reply.text
    running.until_idle()
    assert running.tokens() - before < ENDLESS


@pytest.mark.parametrize("way", STREAMED)
def test_past_its_deadline_a_stream_ends_with_an_error(running: Orchestrator, way: str) -> None:
    running.until_idle()
    reply = post(running, STREAMED[way](max_tokens=ENDLESS), x_request_timeout_ms="1000")
    if reply.status_code == 504:
        return  # a busy machine: not a token was there in time
    *_, last = reply.text.removesuffix("\n\n").split("\n\n")
    assert "time that the request was given is over" in str(json.loads(last.removeprefix("data: "))["error"])
    running.until_idle()


async def test_a_grpc_deadline_is_kept(running: Orchestrator) -> None:
    from grpc.aio import AioRpcError
    from kserve import InferenceGRPCClient, InferInput, InferRequest

    tensor = InferInput("input_ids", [1, len(PROMPT)], "INT64", data=PROMPT)
    request = InferRequest(NAME, [tensor], parameters={"max_tokens": ENDLESS, "ignore_eos": True})
    async with InferenceGRPCClient(f"127.0.0.1:{running.ports[1]}") as client:
        with pytest.raises(AioRpcError, match="DEADLINE_EXCEEDED"):
            await client.infer(request, timeout=0.3)
    await asyncio.to_thread(running.until_idle)


async def fill(running: Orchestrator, client: httpx.AsyncClient) -> list[asyncio.Task[httpx.Response]]:
    """Requests that hold all places of the lane until they are cancelled."""
    path, body = completion(max_tokens=ENDLESS)
    tasks = [asyncio.create_task(client.post(running.url + path, json=body)) for _ in range(int(LIMITS["LANE_WIDTH"]))]
    await asyncio.to_thread(running.wait, lambda: running.sequences() == [4.0, 4.0])
    return tasks


async def leave(tasks: Sequence[asyncio.Task[Any]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_a_request_whose_time_is_over_leaves_the_line(running: Orchestrator) -> None:
    async with httpx.AsyncClient(timeout=120) as client:
        filling = await fill(running, client)
        path, body = completion(max_tokens=8)
        reply = await client.post(running.url + path, json=body, headers={"x-request-timeout-ms": "100"})
        assert reply.status_code == 504
        assert await asyncio.to_thread(running.waiting) == 0
        assert not any(task.done() for task in filling)
        await leave(filling)
    await asyncio.to_thread(running.until_idle)


# -- clients that leave


@pytest.mark.parametrize("way", ALL)
async def test_a_client_that_leaves_while_it_waits_leaves_the_line(running: Orchestrator, way: str) -> None:
    await asyncio.to_thread(running.until_idle)
    async with httpx.AsyncClient(timeout=120) as client, httpx.AsyncClient(timeout=120) as leaving:
        filling = await fill(running, client)
        path, body = ALL[way]()
        task = asyncio.create_task(leaving.post(running.url + path, json=body))
        await asyncio.to_thread(running.wait, lambda: running.waiting() > 0)
        await leave([task])
        await asyncio.to_thread(running.wait, lambda: running.waiting() == 0)
        assert await asyncio.to_thread(running.sequences) == [4.0, 4.0]
        await leave(filling)


@pytest.mark.parametrize("way", ["completion", "completion stream"])
async def test_a_client_that_leaves_while_its_prompt_is_computed_stops_that(running: Orchestrator, way: str) -> None:
    """A prompt of 250 steps."""
    await asyncio.to_thread(running.until_idle)
    before = await asyncio.to_thread(running.tokens)
    async with httpx.AsyncClient(timeout=120) as client:
        path, body = ALL[way](prompt=[7] * 4000)
        task = asyncio.create_task(client.post(running.url + path, json=body))
        await asyncio.to_thread(running.wait, lambda: running.sequences()[0] == 1.0)
        await leave([task])
    await asyncio.to_thread(running.until_idle)
    assert await asyncio.to_thread(running.tokens) - before < 4000


# -- more than it can do


@dataclass
class Load:
    """What came of requests. `wrong` holds what should not have come."""

    seconds: float = 0.0
    offered: int = 0
    tokens: int = 0  # of whole answers
    refused: int = 0
    told_s: list[int] = field(default_factory=list)  # Retry-After
    wrong: list[str] = field(default_factory=list)

    @property
    def goodput(self) -> float:
        """Tokens of whole answers a second."""
        return self.tokens / self.seconds


@dataclass(frozen=True)
class Crowd:
    """Clients of one orchestrator that ask for the same answer."""

    orchestrator: Orchestrator
    prompt: list[int]
    expected: list[int]

    async def ask(self, session: Any, load: Load) -> None:
        path, body = completion(prompt=self.prompt, max_tokens=len(self.expected), temperature=0)
        load.offered += 1
        async with session.post(self.orchestrator.url + path, json=body) as reply:
            if reply.status == 429:
                load.refused += 1
                load.told_s.append(int(reply.headers["retry-after"]))
                return
            answer = await reply.json()
            if reply.status == 200 and answer["choices"][0]["token_ids"] == self.expected:
                load.tokens += len(self.expected)
            else:
                load.wrong.append(json.dumps(answer)[:300])

    async def as_many_as_can(self, session: Any, clients: int, seconds: float) -> Load:
        """Each client asks again when it has its answer."""
        load, began_s = Load(), time.monotonic()

        async def one() -> None:
            while time.monotonic() - began_s < seconds:
                await self.ask(session, load)

        await asyncio.gather(*(one() for _ in range(clients)))
        load.seconds = time.monotonic() - began_s
        return load

    async def at_rate(self, session: Any, requests_per_s: float, seconds: float) -> Load:
        """Requests come when they come."""
        load, began_s, asking = Load(), time.monotonic(), set()
        while (passed_s := time.monotonic() - began_s) < seconds:
            while load.offered < requests_per_s * passed_s:
                task = asyncio.create_task(self.ask(session, load))
                asking.add(task)
                task.add_done_callback(asking.discard)
                await asyncio.sleep(0)
            await asyncio.sleep(0.005)
        load.seconds = time.monotonic() - began_s
        await asyncio.gather(*asking)
        return load


async def crowd_of(orchestrator: Orchestrator, max_tokens: int) -> Crowd:
    prompt = list(range(30, 70))
    path, body = completion(prompt=prompt, max_tokens=max_tokens, temperature=0)
    async with httpx.AsyncClient(timeout=120) as client:
        answer = (await client.post(orchestrator.url + path, json=body)).json()
    return Crowd(orchestrator, prompt, answer["choices"][0]["token_ids"])


async def test_what_is_too_much_is_refused_and_the_rest_is_answered(running: Orchestrator) -> None:
    import aiohttp

    await asyncio.to_thread(running.until_idle)
    crowd, load = await crowd_of(running, 16), Load()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        await asyncio.gather(*(crowd.ask(session, load) for _ in range(80)))
    assert not load.wrong
    assert load.tokens >= int(LIMITS["REQUESTS_MAX"]) * 16
    assert load.refused == 80 - load.tokens // 16 > 0
    assert min(load.told_s) >= 1


@pytest.mark.slow
@pytest.mark.timeout(1800)
async def test_ten_times_the_peak_for_minutes_leaves_goodput_and_memory_where_they_were(
    new_orchestrator: Callable[..., Orchestrator], capsys: pytest.CaptureFixture[str]
) -> None:
    """Seconds are to be given by STAGECRAFT_OVERLOAD_S."""
    import aiohttp
    import psutil

    seconds = float(os.environ.get("STAGECRAFT_OVERLOAD_S", "300"))
    orchestrator = new_orchestrator(REQUESTS_MAX="48", LANES_MAX="0", LANE_WIDTH="16", STEP_TOKENS_MAX="512")
    crowd = await crowd_of(orchestrator, 64)
    assert orchestrator.process is not None
    stages = [
        connection.pid
        for connection in psutil.net_connections("tcp")
        for url in orchestrator.stage_urls
        if connection.status == psutil.CONN_ESTABLISHED and url.endswith(f":{connection.laddr.port}")
    ]
    watched = [psutil.Process(pid) for pid in {orchestrator.process.pid, *stages} if pid and pid != os.getpid()]
    sizes: list[int] = []

    async def watch() -> None:
        while True:
            sizes.append(sum(process.memory_info().rss for process in watched))
            await asyncio.sleep(1)

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=600)) as session:
        await crowd.as_many_as_can(session, 40, 5)  # warm
        peak = await crowd.as_many_as_can(session, 40, min(60, seconds / 4))
        watching = asyncio.create_task(watch())
        rate = 10 * peak.goodput / len(crowd.expected)
        over = await crowd.at_rate(session, rate, seconds)
        watching.cancel()
    first, last = sizes[len(sizes) // 4], sizes[-1]
    with capsys.disabled():
        print(
            f"\noverload: {len(watched)} processes; peak {peak.goodput:.0f} tok/s; offered {over.offered} requests in "
            f"{over.seconds:.0f} s ({rate:.0f}/s), refused {over.refused}, goodput {over.goodput:.0f} tok/s "
            f"({over.goodput / peak.goodput:.2f}); RSS {first >> 20} MiB -> {last >> 20} MiB; Retry-After "
            f"{min(over.told_s)} to {max(over.told_s)} s"
        )
    assert not peak.wrong + over.wrong
    assert over.goodput >= 0.9 * peak.goodput
    assert last <= 1.05 * first
    orchestrator.end(signal.SIGTERM)
