"""A Broker as producers meet it: what it takes, what it refuses, and who gets what."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any

import pytest
from aiohttp import web

from knative.errors import NotFound, ValidationError
from knative.eventing.http_binding import BATCHED, STRUCTURED

Start = Callable[..., Any]
Subscribe = Callable[..., Awaitable[Any]]
Make = Callable[..., dict[str, Any]]
Send = Callable[..., Awaitable[int]]

HEADERS = {"ce-specversion": "1.0", "ce-id": "1", "ce-source": "/tests", "ce-type": "test"}


def event(event_id: str, **members: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": event_id, "source": "/tests", "type": "test", **members}


def reply_with(kind: str) -> Callable[[Any], web.Response]:
    def react(came: Any) -> web.Response:
        headers = {**HEADERS, "ce-id": f"re-{came.id}", "ce-type": kind, "content-type": "application/json"}
        return web.Response(body=came.data, headers=headers)

    return react


def counted(cluster: Any, kind: str, name: str) -> dict[str, Any]:
    """What `status` says of a Broker or Trigger."""
    (one,) = (one for one in cluster.platform.status()[kind] if one["name"] == name)
    return dict(one)


async def test_each_trigger_gets_what_its_filter_lets_pass(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    everything, some, few = [await subscriber() for _ in range(3)]
    await cluster.apply(
        trigger("everything", f"{everything.url}/in?x=1"),
        trigger("some", some.url, filter={"attributes": {"type": "wanted"}}),
        trigger("few", few.url, filters=[{"cesql": "type = 'wanted'"}, {"prefix": {"team": "a"}}]),
        broker(),
    )
    assert [await send(cluster, "1", type="other"), await send(cluster, "2", type="wanted", team="abc")] == [202, 202]
    assert await send(cluster, "3", type="wanted", team="b", data=b'{"text": "\xc3\xa9"}') == 202
    assert (sorted(await everything.has(3)), sorted(await some.has(2)), await few.has(1)) == (
        ["1", "2", "3"],
        ["2", "3"],
        ["2"],
    )
    last = next(one for one in everything.seen if one.event.id == "3")
    assert (last.path, last.event.data) == ("/in", b'{"text": "\xc3\xa9"}')
    assert {name: last.headers[name] for name in ("Prefer", "Kn-Namespace")} == {
        "Prefer": "reply",
        "Kn-Namespace": "default",
    }
    assert set(last.event.attributes) == {
        "specversion", "id", "source", "type", "team", "datacontenttype", "knativearrivaltime",
    }  # fmt: skip


async def test_a_reply_is_an_event_of_the_broker(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    first, second = await subscriber(reply_with("answer")), await subscriber()
    questions = trigger("questions", first.url, filter={"attributes": {"type": "question"}})
    await cluster.apply(broker(), questions, trigger("answers", second.url, filters=[{"exact": {"type": "answer"}}]))
    await send(cluster, "1", type="question", data=b'{"n": 1}')
    assert await second.has(1) == ["re-1"]
    assert second.seen[0].event.data == b'{"n": 1}'
    assert first.ids == ["1"]


async def test_a_loop_of_replies_ends(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()
    echo = await subscriber(reply_with("test"))
    await cluster.apply(broker(), trigger("loop", echo.url))
    await send(cluster, "1", knativebrokerttl="4")
    assert await echo.has(3) == ["1", "re-1", "re-re-1"]
    await until(lambda: counted(cluster, "triggers", "loop")["waiting"] == 0)
    assert counted(cluster, "brokers", "default")["accepted"] == 3
    assert len(echo.seen) == 3


async def test_structured_and_batched_events(start: Start, subscriber: Subscribe, broker: Make, trigger: Make) -> None:
    cluster = await start()
    binary, as_json = await subscriber(), await subscriber()
    await cluster.apply(
        broker(), trigger("binary", binary.url), trigger("as-json", as_json.url, delivery={"format": "json"})
    )
    url = f"{cluster.platform.url}/default/default/"  # as Knative, with or without the slash
    one, batch = event("1", data={"a": 1}, count=3), [event("2"), event("3", data_base64="AAE=")]
    for body, kind in ((one, STRUCTURED), (batch, BATCHED)):
        async with cluster.client.post(url, data=json.dumps(body), headers={"content-type": kind}) as answer:
            assert answer.status == 202, await answer.text()
    assert sorted(await binary.has(3)) == sorted(await as_json.has(3)) == ["1", "2", "3"]
    seen = {one.event.id: one for one in as_json.seen}
    assert {one.headers["Content-Type"] for one in seen.values()} == {STRUCTURED}
    assert seen["1"].event.values()["count"] == 3
    assert seen["1"].event.data == b'{"a": 1}'
    assert seen["3"].event.data == b"\0\1"
    assert {one.headers.get("ce-id") for one in binary.seen} == {"1", "2", "3"}


async def test_a_batch_is_taken_whole_or_not_at_all(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    sink = await subscriber()
    await cluster.apply(broker(), trigger("all", sink.url))
    body = json.dumps([event("1"), event("")])
    url = f"{cluster.platform.url}/default/default"
    async with cluster.client.post(url, data=body, headers={"content-type": BATCHED}) as answer:
        assert (answer.status, await answer.text()) == (
            400,
            "event 1 of the batch: not a CloudEvent 1.0: id must not be empty\n",
        )
    await send(cluster, "2")
    assert await sink.has(1) == ["2"]


@pytest.mark.parametrize(
    ("method", "path", "headers", "status", "text"),
    [
        ("GET", "/default/default", {}, 405, "a broker takes events by POST, not GET"),
        ("POST", "/default/other", HEADERS, 404, "there is no broker 'other' in namespace 'default'"),
        ("POST", "/", HEADERS, 404, "no broker is named; expected /NAMESPACE/BROKER"),
        ("POST", "/default", HEADERS, 400, "the path /default names no broker; expected /NAMESPACE/BROKER"),
        ("POST", "/default/default/x", HEADERS, 400, "the path /default/default/x names no broker; expected"),
        ("POST", "/default/default", {}, 400, "not a CloudEvent: no header ce-id, ce-source, ce-specversion, ce-type"),
        ("POST", "/default/default", {**HEADERS, "ce-knativebrokerttl": "1"}, 400, "has passed through brokers too"),
        ("POST", "/default/default", {**HEADERS, "content-encoding": "gzip"}, 415, "the body is encoded in gzip"),
        ("POST", "/default/default", {**HEADERS, "content-length": "99999999"}, 413, "the body has 99999999 bytes"),
    ],
)
async def test_what_a_cluster_refuses_is_refused_with_a_reason(
    start: Start, broker: Make, method: str, path: str, headers: dict[str, str], status: int, text: str
) -> None:
    cluster = await start()
    await cluster.apply(broker())
    reader, writer = await asyncio.open_connection("127.0.0.1", int(cluster.platform.url.rpartition(":")[2]))
    head = {"host": "broker-ingress.knative-eventing.svc.cluster.local", "content-length": "0", **headers}
    lines = [f"{method} {path} HTTP/1.1", *(f"{name}: {value}" for name, value in head.items()), "", ""]
    writer.write("\r\n".join(lines).encode())
    answer = (await reader.readuntil(b"\r\n\r\n")).decode()
    said = await reader.read(2000)
    writer.close()
    assert answer.startswith(f"HTTP/1.1 {status} ")
    assert text in said.decode()
    if status != 405:
        return
    async with cluster.client.options(f"{cluster.platform.url}/default/default") as options:
        assert (options.status, options.headers["Allow"]) == (200, "POST, OPTIONS")
        assert options.headers["WebHook-Allowed-Origin"] == options.headers["WebHook-Allowed-Rate"] == "*"


async def test_processes_reach_the_broker_under_its_name_on_a_cluster(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make
) -> None:
    cluster = await start()
    sink = await subscriber()
    await cluster.apply(broker("mine"), trigger("all", sink.url, broker="mine"))
    url = "http://broker-ingress.knative-eventing.svc.cluster.local/default/mine"
    async with cluster.client.post(url, proxy=cluster.platform.url, headers=HEADERS) as answer:
        assert answer.status == 202
    await sink.has(1)


async def test_a_broker_may_subscribe_to_another(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    sink = await subscriber()
    other = {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "other"}}
    await cluster.apply(trigger("on", other), broker(), broker("other"), trigger("end", sink.url, broker="other"))
    await send(cluster, "1", knativebrokerttl="3")
    assert await sink.has(1) == ["1"]


async def test_a_broker_that_subscribes_to_itself_ends_by_ttl(
    start: Start, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()
    itself = {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "default"}}
    await cluster.apply(broker(), trigger("loop", itself))
    await send(cluster, "1", knativebrokerttl="5")
    # refused once its passes are used up; the pass before may be counted after that
    await until(lambda: (seen := counted(cluster, "triggers", "loop"))["lost"] == 1 and seen["delivered"] >= 3)
    assert counted(cluster, "triggers", "loop")["delivered"] == 3


async def test_two_may_apply_the_first_broker_at_once(start: Start, broker: Make) -> None:
    cluster = await start()
    await asyncio.gather(cluster.apply(broker()), cluster.apply(broker("other")))
    assert len(cluster.platform.get("broker", "default")) == 2


async def test_a_broker_applied_again_while_it_is_deleted_delivers_to_all_its_triggers(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    answering = asyncio.Event()

    async def slowly(_: Any) -> web.Response:
        await answering.wait()
        return web.Response(status=202)

    sinks = [await subscriber(slowly) for _ in range(3)]
    await cluster.apply(broker(), *(trigger(f"to-{index}", sink.url) for index, sink in enumerate(sinks)))
    await send(cluster, "before")
    for sink in sinks:
        await sink.has(1)
    deleting = asyncio.create_task(cluster.platform.delete("broker", "default", "default"))
    await asyncio.sleep(0)
    await cluster.apply(broker())
    await deleting
    answering.set()
    await send(cluster, "after")
    for sink in sinks:
        assert await sink.has(2) == ["before", "after"]


async def test_a_service_of_the_brokers_name_keeps_the_path(start: Start, service: Make, broker: Make) -> None:
    cluster = await start()
    await cluster.apply(broker(), service("default"))
    assert (await cluster.ask("default"))["text"] == "hello"
    (shown,) = cluster.platform.get("broker", "default")
    assert shown["status"]["address"]["url"] == (
        "http://broker-ingress.knative-eventing.svc.cluster.local/default/default"
    )


async def test_a_full_disk_stops_intake_and_nothing_else(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start()
    release = asyncio.Event()

    async def slowly(_: Any) -> web.Response:
        await release.wait()
        return web.Response(status=202)

    sink = await subscriber(slowly)
    await cluster.apply(broker(), trigger("all", sink.url))
    assert await send(cluster, "1") == 202
    with monkeypatch.context() as full:
        full.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=1, f_frsize=4096))
        assert await send(cluster, "2") == 507
        release.set()
        assert await sink.has(1) == ["1"]
    assert await send(cluster, "3") == 202
    assert await sink.has(2) == ["1", "3"]
    metrics = cluster.platform.metrics().decode()
    assert 'stagecraft_broker_events_total{http_response_status_code="507",' in metrics


async def test_what_is_shown_of_brokers_and_triggers(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, service: Make, send: Send
) -> None:
    cluster = await start()
    sink = await subscriber()
    ref = {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "late"}, "uri": "/in"}
    await cluster.apply(trigger("to-service", ref), trigger("dead", sink.url, delivery={"deadLetterSink": ref}))
    reasons = {
        one["metadata"]["name"]: one["status"]["conditions"][-1] for one in cluster.platform.get("trigger", None)
    }
    assert reasons["dead"]["message"] == 'Broker "default" does not exist'
    await cluster.apply(broker())
    await send(cluster, "1")
    shown = {one["metadata"]["name"]: one["status"] for one in cluster.platform.get("trigger", "default")}
    assert shown["to-service"]["conditions"][-1] == {
        "type": "Ready",
        "status": "False",
        "reason": "Unable to get the Subscriber's URI",
        "message": 'services.serving.knative.dev "late" not found in namespace default',
    }
    assert shown["to-service"]["deliveries"]["waiting"] == 1
    assert shown["dead"]["conditions"][-1]["reason"] == "Unable to get the dead letter sink's URI"
    await cluster.apply(service("late"))
    shown = {one["metadata"]["name"]: one["status"] for one in cluster.platform.get("trigger", "default")}
    assert [status["conditions"][-1] for status in shown.values()] == [{"type": "Ready", "status": "True"}] * 2
    assert shown["to-service"]["subscriberUri"] == "http://late.default.svc.cluster.local/in"
    (one,) = cluster.platform.get("broker", None)
    assert one["status"]["address"]["url"] == f"{cluster.platform.url}/default/default"
    assert counted(cluster, "brokers", "default")["accepted"] == 1


async def test_a_trigger_stays_with_its_broker(start: Start, broker: Make, trigger: Make) -> None:
    cluster = await start()
    one = trigger("one", "http://127.0.0.1:1")
    done = await cluster.apply(broker(), one)
    assert [(applied.kind, applied.action) for applied in done] == [
        ("broker.eventing.knative.dev", "created"),
        ("trigger.eventing.knative.dev", "created"),
    ]
    assert [applied.action for applied in await cluster.apply(one, broker())] == ["unchanged"] * 2
    changed = trigger("one", "http://127.0.0.1:1", filters=[{"exact": {"type": "a"}}])
    assert (await cluster.apply(changed))[0].action == "configured"
    with pytest.raises(ValidationError, match=r"Immutable fields changed \(-old \+new\): spec, broker"):
        await cluster.apply(trigger("one", "http://127.0.0.1:1", broker="other"))


async def test_what_is_deleted_gets_nothing_more(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    sink = await subscriber()
    missing = {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "missing"}}
    await cluster.apply(broker(), trigger("waits", missing), trigger("gets", sink.url))
    await send(cluster, "1")
    await sink.has(1)
    assert counted(cluster, "triggers", "waits")["waiting"] == 1
    await cluster.platform.delete("trigger", "default", "waits")
    assert [one["name"] for one in cluster.platform.status()["triggers"]] == ["gets"]
    await cluster.platform.delete("broker", "default", "default")
    assert await send(cluster, "2") == 404
    (left,) = cluster.platform.get("trigger", None)
    assert left["status"]["conditions"][-1]["reason"] == "BrokerDoesNotExist"
    await cluster.apply(broker(), trigger("waits", sink.url))
    await send(cluster, "3")
    assert await sink.has(3) == ["1", "3", "3"]
    for kind, name in (("trigger", "none"), ("broker", "none")):
        with pytest.raises(NotFound, match=f"{kind} 'none' not found in namespace 'default'"):
            await cluster.platform.delete(kind, "default", name)


async def test_a_platform_without_brokers_touches_no_file(start: Start, service: Make, trigger: Make) -> None:
    cluster = await start()
    await cluster.apply(service("one"), trigger("one", "http://127.0.0.1:1"))
    assert not cluster.platform.data_folder.exists()
