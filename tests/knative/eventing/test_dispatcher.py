"""Delivery: attempts, waits, dead letters, bounds, and what outlives a platform."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml
from aiohttp import web

from knative.errors import Unavailable
from knative.eventing.delivery import DeliverySpec
from knative.eventing.dispatcher import Dispatcher, Route
from knative.eventing.event import CloudEvent
from knative.eventing.store import Delivery, EventStore, NewEvent, StoreError
from knative.eventing.subscribers import Answer, Sender

Start = Callable[..., Any]
Subscribe = Callable[..., Awaitable[Any]]
Make = Callable[..., dict[str, Any]]
Send = Callable[..., Awaitable[int]]


def in_turn(*statuses: int, **headers: str) -> Callable[[Any], web.Response]:
    """Answers so, the last one from then on."""
    answers = itertools.chain(statuses, itertools.repeat(statuses[-1]))
    return lambda _: web.Response(status=next(answers), headers=headers, text="why")


def counted(cluster: Any, name: str) -> dict[str, Any]:
    """What `status` says of a Trigger."""
    (one,) = (one for one in cluster.platform.status()["triggers"] if one["name"] == name)
    return dict(one)


async def test_failed_attempts_are_repeated_after_the_waits_of_the_policy(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()
    policy = {"retry": 3, "backoffPolicy": "exponential", "backoffDelay": "PT0.05S"}
    sink = await subscriber(lambda _: web.Response(status=503 if len(sink.seen) < 4 else 200))
    await cluster.apply(broker(), trigger("one", sink.url, delivery=policy))
    await send(cluster, "1")
    assert await sink.has(4) == ["1"] * 4
    times = [one.at_s for one in sink.seen]
    waits = [after - before for before, after in itertools.pairwise(times)]
    assert [wait >= least for wait, least in zip(waits, (0.05, 0.1, 0.2), strict=True)] == [True] * 3
    await until(lambda: counted(cluster, "one")["delivered"] == 1)
    assert {key: counted(cluster, "one")[key] for key in ("retried", "lost", "waiting")} == {
        "retried": 3,
        "lost": 0,
        "waiting": 0,
    }


@pytest.mark.parametrize(
    ("status", "attempts", "code"),
    [(500, 3, 500), (404, 3, 404), (400, 1, 400), (302, 1, 302), (200, 3, 502)],
)
async def test_what_cannot_be_delivered_goes_to_the_dead_letter_sink(
    start: Start,
    subscriber: Subscribe,
    broker: Make,
    trigger: Make,
    send: Send,
    status: int,
    attempts: int,
    code: int,
) -> None:
    cluster = await start()
    failing = await subscriber(in_turn(status, location="http://127.0.0.1:1/"))  # 200 with a body that is no event
    dead = await subscriber(in_turn(500, 200))
    await cluster.apply(
        broker(retry=9, deadLetterSink={"uri": f"{dead.url}/dead"}),
        trigger("one", f"{failing.url}/in", delivery={"retry": 2}),
    )
    await send(cluster, "1", team="a", data=b'{"n": 1}')
    assert await dead.has(2) == ["1", "1"]  # tried as often as the subscriber
    letter = dead.seen[-1].event
    assert (dead.seen[-1].path, letter.data, letter.attributes["team"]) == ("/dead", b'{"n": 1}', "a")
    assert letter.attributes["knativeerrordest"] == f"{failing.url}/in"
    assert letter.attributes["knativeerrorcode"] == str(code)
    said = base64.b64decode(letter.attributes["knativeerrordata"]).decode()
    assert said == ("why" if status != 200 else "the reply is no CloudEvent, and its body is not empty")
    assert failing.ids == ["1"] * attempts


async def test_no_answer_is_a_failed_attempt(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()

    async def never(_: Any) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    slow, dead = await subscriber(never), await subscriber()
    await cluster.apply(
        broker(retry=1, timeout="PT0.5S", deadLetterSink={"uri": dead.url}),
        trigger("slow", slow.url, filters=[{"exact": {"type": "slow"}}]),
        trigger("refused", "http://127.0.0.1:1/", filters=[{"exact": {"type": "refused"}}]),
    )
    await send(cluster, "1", type="slow")
    await send(cluster, "2", type="refused")
    # the sink has the same time: on a machine that stands still for so long it gets a letter twice
    await until(lambda: set(dead.ids) == {"1", "2"})
    assert slow.ids == ["1", "1"]
    assert {one.event.attributes["knativeerrorcode"] for one in dead.seen} == {"500"}
    data = {one.event.id: base64.b64decode(one.event.attributes["knativeerrordata"]).decode() for one in dead.seen}
    assert data["1"] == f"no answer from {slow.url} within 0.5 s"
    assert data["2"].startswith("dispatch error: ")


async def test_a_slow_subscriber_stops_no_other_and_gets_no_more_than_it_may_at_once(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()
    release = asyncio.Event()

    async def slowly(_: Any) -> web.Response:
        await release.wait()
        return web.Response(status=202)

    slow, fast = await subscriber(slowly), await subscriber()
    await cluster.apply(broker(), trigger("slow", slow.url, in_flight=2), trigger("fast", fast.url))
    for number in range(20):
        assert await send(cluster, str(number)) == 202
    assert sorted(await fast.has(20), key=int) == [str(number) for number in range(20)]
    await slow.has(2)
    assert (slow.busiest, counted(cluster, "slow")["waiting"]) == (2, 20)
    release.set()
    assert sorted(await slow.has(20), key=int) == [str(number) for number in range(20)]
    assert slow.busiest == 2
    await until(lambda: counted(cluster, "slow")["waiting"] == 0)


async def test_a_busy_subscriber_is_waited_for_without_using_up_attempts(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()
    answers = iter([(429, {"Retry-After": "0"}), (503, {"Retry-After": "1"}), (202, {})])

    def busy(_: Any) -> web.Response:
        status, headers = next(answers)
        return web.Response(status=status, headers=headers)

    sink = await subscriber(busy)
    await cluster.apply(broker(retry=0), trigger("one", sink.url))
    await send(cluster, "1")
    assert await sink.has(3) == ["1"] * 3
    waits = [after.at_s - before.at_s for before, after in itertools.pairwise(sink.seen)]
    assert [wait >= 1 for wait in waits] == [True, True]
    await until(lambda: counted(cluster, "one")["delivered"] == 1)
    assert (counted(cluster, "one")["busy"], counted(cluster, "one")["lost"]) == (2, 0)


@pytest.mark.parametrize("kind", ["Service", "InferenceService"])
async def test_a_service_at_zero_wakes_for_an_event(
    start: Start,
    subscriber: Subscribe,
    broker: Make,
    trigger: Make,
    settings_of: Make,
    send: Send,
    service: Make,
    kind: str,
) -> None:
    cluster = await start()
    sink = await subscriber()
    command = [sys.executable, "-c", ECHO]
    asleep, version, runs_as = (
        service("asleep", image="stagecraft/process", command=command),
        "serving.knative.dev/v1",
        "asleep",
    )
    if kind == "InferenceService":
        version, runs_as = "serving.kserve.io/v1beta1", "asleep-predictor"
        predictor = {"minReplicas": 0, "containers": asleep["spec"]["template"]["spec"]["containers"]}
        asleep = {"apiVersion": version, "kind": kind, "metadata": {"name": "asleep"}, "spec": {"predictor": predictor}}
    ref = {"ref": {"apiVersion": version, "kind": kind, "name": "asleep"}, "uri": "in"}
    zero = settings_of(**{"allow-zero-initial-scale": "true", "initial-scale": "0"})
    await cluster.apply(zero, broker(), trigger("asleep", ref, filters=[{"exact": {"type": "test"}}]))
    await cluster.apply(trigger("replies", sink.url, filters=[{"exact": {"type": "echo"}}]))
    await send(cluster, "1", data=b'{"n": 1}')
    await cluster.apply(asleep)  # what came before it waits for it
    assert await sink.has(1) == ["echo-1"]
    assert sink.seen[0].event.data == b"/in"
    assert cluster.status(runs_as)["ready"] == 1


ECHO = """
import http.server, os

class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        headers = {"specversion": "1.0", "id": "echo-" + self.headers["ce-id"], "source": "/echo", "type": "echo"}
        for name, value in headers.items():
            self.send_header("ce-" + name, value)
        self.send_header("content-length", str(len(self.path)))
        self.end_headers()
        self.wfile.write(self.path.encode())

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer(("127.0.0.1", int(os.environ["PORT"])), Handler).serve_forever()
"""


async def test_what_a_platform_does_not_deliver_the_next_one_does(
    start: Start,
    subscriber: Subscribe,
    broker: Make,
    trigger: Make,
    send: Send,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("knative.platform.GRACE_S", 0.1)
    waiting = asyncio.Event()

    async def hold(_: Any) -> web.Response:
        await waiting.wait()
        return web.Response(status=202)

    sink = await subscriber(hold)
    objects = (broker(), trigger("one", sink.url, in_flight=1))
    first = await start(data_folder=tmp_path / "data")
    await first.apply(*objects)
    for number in range(5):
        await send(first, str(number))
    await sink.has(1)
    await first.platform._close()
    waiting.set()
    second = await start(data_folder=tmp_path / "data")
    (left,) = second.platform.status()["triggers"]
    assert (left["waiting"], left["ready"], left["name"]) == (5, False, "one")
    await second.apply(*objects)
    assert (await sink.has(6))[1:] == [str(number) for number in range(5)]


async def test_a_changed_filter_holds_for_new_events_only(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    sink = await subscriber()
    missing = {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "missing"}}
    await cluster.apply(broker(), trigger("one", missing, filters=[{"exact": {"type": "old"}}]))
    await send(cluster, "1", type="old")
    await cluster.apply(trigger("one", sink.url, filters=[{"exact": {"type": "new"}}]))
    await send(cluster, "2", type="old")
    await send(cluster, "3", type="new")
    assert sorted(await sink.has(2)) == ["1", "3"]


async def test_a_file_of_a_newer_version_is_refused_and_left_as_it_is(
    start: Start, broker: Make, tmp_path: Path
) -> None:
    cluster = await start(data_folder=tmp_path / "data")
    await cluster.apply(broker())
    await cluster.platform._close()
    path = tmp_path / "data" / "events.sqlite"
    with path.open("r+b") as file:
        file.seek(60)  # user_version in the header of SQLite
        file.write((99).to_bytes(4))
    before = path.read_bytes()
    with pytest.raises(Unavailable, match=r"cannot keep events in .*data \(--data-dir\): .* has version 99"):
        await start(data_folder=tmp_path / "data")
    assert path.read_bytes() == before


# a process of its own, to be killed
PLATFORM = """
import asyncio, sys
from pathlib import Path
import structlog
from knative.platform import Platform, PlatformSettings
from knative.resources.documents import parse_documents

async def main():
    async with Platform(PlatformSettings(folder=Path(sys.argv[1]), name="x", port=0, gpus=())) as platform:
        await platform.apply(parse_documents(sys.argv[2], "m.yaml"))
        print(platform.url, flush=True)
        await asyncio.sleep(600)

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
asyncio.run(main())
"""


async def test_no_accepted_event_is_lost_when_the_platform_is_killed(
    subscriber: Subscribe, broker: Make, trigger: Make, tmp_path: Path, root: Path
) -> None:
    sink = await subscriber()
    manifest = yaml.safe_dump_all([broker(), trigger("one", sink.url, in_flight=2)])
    argv = [sys.executable, "-c", PLATFORM, str(tmp_path), manifest]
    accepted: set[str] = set()
    for life in range(3):
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)})  # noqa: ASYNC220 (its output is read in a thread)
        try:
            assert process.stdout is not None
            url = (await asyncio.to_thread(process.stdout.readline)).decode().strip()
            if life < 2:
                accepted |= await produce_until_killed(process, f"{url}/default/default", life)
            else:
                await everything(sink, accepted)
        finally:
            process.kill()
            process.wait()
            process.stdout.close()
    assert len(accepted) > 10


async def everything(sink: Any, accepted: set[str]) -> None:
    async with asyncio.timeout(30):
        while not accepted <= set(sink.ids):  # noqa: ASYNC110 (requests set no events)
            await asyncio.sleep(0.02)


async def produce_until_killed(process: subprocess.Popen[bytes], url: str, life: int) -> set[str]:
    """Ids that were answered 202 by a platform that is killed meanwhile."""
    accepted: set[str] = set()

    async def produce(client: aiohttp.ClientSession, producer: int) -> None:
        for number in itertools.count():
            event_id = f"{life}-{producer}-{number}"
            members = {"specversion": "1.0", "id": event_id, "source": "/tests", "type": "test"}
            headers = {"content-type": "application/cloudevents+json"}
            async with client.post(url, data=json.dumps(members), headers=headers) as answer:
                assert answer.status == 202
            accepted.add(event_id)
            if len(accepted) == 60:
                process.kill()

    async with aiohttp.ClientSession() as client:
        ended = await asyncio.gather(*(produce(client, number) for number in range(8)), return_exceptions=True)
    assert {isinstance(error, aiohttp.ClientError) for error in ended} == {True}, ended
    return accepted


async def test_dead_letters_to_the_same_broker_end_by_ttl(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()
    sink = await subscriber(in_turn(400))
    itself = {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "default"}}
    await cluster.apply(broker(), trigger("one", sink.url, delivery={"deadLetterSink": itself}))
    await send(cluster, "1", knativebrokerttl="4")
    await until(lambda: counted(cluster, "one")["lost"] == 1)  # the last dead letter, which the Broker refuses
    assert len(sink.seen) == 3


async def test_large_events_are_fewer_at_once(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knative.eventing.dispatcher.HELD_BYTES_MAX", 30_000)
    cluster = await start()

    async def slowly(_: Any) -> web.Response:
        await sink.has(3)
        await asyncio.sleep(0.02)
        return web.Response(status=202)

    sink = await subscriber(slowly)
    nobody = {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "later"}}
    await cluster.apply(broker(), trigger("one", nobody))
    numbers = [str(number) for number in range(12)]
    for number in numbers:
        await send(cluster, number, data=b"%10000d" % 1)
    await cluster.apply(trigger("one", sink.url))
    assert sorted(await sink.has(12)) == sorted(numbers)
    assert sink.busiest == 3


class _Hiccup(EventStore):
    """Whose first write of a delivery's end fails, as on a disk that gives one error."""

    failures = 1

    async def settle(self, delivery: Delivery, *, replies: Sequence[NewEvent] = ()) -> bool:
        if self.failures:
            self.failures -= 1
            raise StoreError("disk I/O error")
        return await super().settle(delivery, replies=replies)


class _Accepting(Sender):
    def __init__(self) -> None:
        self.sent = 0

    async def send(self, event: CloudEvent, url: str, **how: object) -> Answer:
        self.sent += 1
        return Answer(202)


async def test_what_could_not_be_noted_as_delivered_is_delivered_again_without_a_restart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("knative.eventing.dispatcher.BROKEN_S", 0.01)
    store, sender = await _Hiccup.open(tmp_path / "events.sqlite"), _Accepting()
    route = Route("http://nobody", "default", DeliverySpec(), 1)
    attributes = {"specversion": "1.0", "id": "1", "source": "/tests", "type": "test"}
    await store.accept([NewEvent(broker="b", key="1", attributes=attributes, data=None, ttl=9, targets=["one"])])
    dispatcher = Dispatcher(
        "one",
        store,
        sender,
        route=lambda: route,
        intake=lambda delivery, events: [],
        arrived=lambda new: None,
        observe=lambda status, seconds: None,
    )
    async with asyncio.timeout(10):
        while store.depth("one"):  # noqa: ASYNC110 (the end of a delivery sets no event)
            await asyncio.sleep(0.005)
    await dispatcher.close()
    await store.close()
    assert sender.sent == 2
