"""A Sequence on one machine: each step gets what the one before it replied, durably, and the reply ends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from aiohttp import web

from knative.errors import NotFound
from knative.eventing.delivery import DeliverySpec
from knative.eventing.destination import Destination
from knative.resources.eventing import read_sequence

Start = Callable[..., Any]
Subscribe = Callable[..., Awaitable[Any]]
Make = Callable[..., dict[str, Any]]
Send = Callable[..., Awaitable[int]]

TO_SEQUENCE = {"ref": {"apiVersion": "flows.knative.dev/v1", "kind": "Sequence", "name": "s"}}
TO_BROKER = {"ref": {"apiVersion": "eventing.knative.dev/v1", "kind": "Broker", "name": "default"}}
OF_TEST = {"attributes": {"type": "test"}}


def sequence(*steps: Any, **spec: Any) -> dict[str, Any]:
    listed = [{"uri": step} if isinstance(step, str) else step for step in steps]
    return {
        "apiVersion": "flows.knative.dev/v1",
        "kind": "Sequence",
        "metadata": {"name": "s"},
        "spec": {"steps": listed, **spec},
    }


def appends(word: bytes, kind: str = "between") -> Callable[[Any], web.Response]:
    """A step that replies with the data and one word more."""

    def react(came: Any) -> web.Response:
        headers = {"ce-specversion": "1.0", "ce-id": came.id, "ce-source": "/step", "ce-type": kind}
        return web.Response(body=came.data + word, headers={**headers, "content-type": "text/plain"})

    return react


async def test_steps_run_in_order_and_the_broker_gets_the_reply(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()
    one, two, end = await subscriber(appends(b" one")), await subscriber(appends(b" two", "done")), await subscriber()
    await cluster.apply(
        broker(),
        trigger("feed", TO_SEQUENCE, filter=OF_TEST),
        trigger("end", end.url, filter={"attributes": {"type": "done"}}),
        sequence(f"{one.url}/in", two.url, reply=TO_BROKER),
    )
    for name in ("1", "2"):
        assert await send(cluster, name, data=b"start") == 202
    assert sorted(await end.has(2)) == ["1", "2"]
    assert {request.event.data for request in end.seen} == {b"start one two"}
    assert (one.seen[0].path, one.seen[0].headers["Prefer"]) == ("/in", "reply")
    # the reply may be on its way to others before it is noted as delivered
    await until(lambda: cluster.platform.get("sequence", "default")[0]["status"]["deliveries"] == {"waiting": 0})
    (shown,) = cluster.platform.get("sequence", "default")
    assert shown["status"]["conditions"] == [{"type": "Ready", "status": "True"}]


async def test_a_step_that_replies_nothing_ends_the_run_of_its_event(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    def some(came: Any) -> web.Response:
        return appends(b"")(came) if came.id == "2" else web.Response(status=202)

    cluster = await start()
    one, two = await subscriber(some), await subscriber()
    await cluster.apply(broker(), trigger("feed", TO_SEQUENCE), sequence(one.url, two.url))
    for name in ("1", "2"):
        await send(cluster, name)
    await one.has(2)
    assert await two.has(1) == ["2"]


async def test_the_reply_of_the_last_step_is_nobodys_without_a_reply(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any]
) -> None:
    cluster = await start()
    one = await subscriber(lambda _: web.Response(text="no event"))
    await cluster.apply(broker(), trigger("feed", TO_SEQUENCE), sequence(one.url))
    await send(cluster, "1")
    await until(lambda: _counted(cluster, "s-kn-sequence-0")["delivered"] == 1)
    assert one.ids == ["1"]


async def test_a_step_that_fails_has_retries_and_a_dead_letter_of_its_own(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    one, two = await subscriber(appends(b" one")), await subscriber(lambda _: web.Response(status=500, text="no"))
    three, dead = await subscriber(), await subscriber()
    delivery = {"retry": 1, "backoffPolicy": "linear", "backoffDelay": "PT0.01S", "deadLetterSink": {"uri": dead.url}}
    steps = (one.url, {"uri": two.url, "delivery": delivery}, three.url)
    await cluster.apply(broker(), trigger("feed", TO_SEQUENCE), sequence(*steps))
    await send(cluster, "1", data=b"start")
    assert await dead.has(1) == ["1"]
    assert (two.ids, three.ids) == (["1", "1"], [])
    letter = dead.seen[0].event
    assert (letter.data, letter.attributes["knativeerrorcode"]) == (b"start one", "500")


async def test_a_reply_may_go_to_any_address(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send
) -> None:
    cluster = await start()
    one, end = await subscriber(appends(b" one")), await subscriber(appends(b" nobody's"))
    await cluster.apply(broker(), trigger("feed", TO_SEQUENCE), sequence(one.url, reply={"uri": f"{end.url}/end"}))
    await send(cluster, "1", data=b"start")
    await end.has(1)
    assert (end.seen[0].path, end.seen[0].event.data) == ("/end", b"start one")


async def test_what_waits_in_a_step_outlives_the_platform(
    start: Start, subscriber: Subscribe, broker: Make, trigger: Make, send: Send, until: Callable[..., Any],
    tmp_path: Any,
) -> None:  # fmt: skip
    data = tmp_path / "data"
    first = await start(data_folder=data)
    one, two = await subscriber(appends(b" one")), await subscriber()
    missing = {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": "later"}}
    await first.apply(broker(), trigger("feed", TO_SEQUENCE), sequence(one.url, missing))
    await send(first, "1", data=b"start")
    await until(lambda: _counted(first, "s-kn-sequence-1")["waiting"] == 1)
    (shown,) = first.platform.get("sequence", "default")
    assert (shown["status"]["conditions"][0]["status"], shown["status"]["deliveries"]["waiting"]) == ("False", 1)
    await first.platform.__aexit__(None, None, None)

    second = await start(data_folder=data)
    await second.apply(broker(), sequence(one.url, two.url))
    await two.has(1)
    assert (one.ids, two.seen[0].event.data) == (["1"], b"start one")


async def test_a_sequence_that_gets_shorter_or_goes_leaves_nothing(
    start: Start, subscriber: Subscribe, broker: Make
) -> None:
    cluster = await start()
    one = await subscriber()
    await cluster.apply(broker(), sequence(one.url, one.url, one.url, reply=TO_BROKER))
    assert _names(cluster) == [*(f"s-kn-sequence-{index}" for index in range(3)), "s-kn-sequence-reply"]
    await cluster.apply(sequence(one.url))
    assert _names(cluster) == ["s-kn-sequence-0"]
    await cluster.platform.delete("sequence", "default", "s")
    assert (_names(cluster), cluster.platform.get("sequence", None)) == ([], [])
    assert [one["metadata"]["name"] for one in cluster.platform.get("broker", None)] == ["default"]
    with pytest.raises(NotFound):
        await cluster.platform.delete("sequence", "default", "s")


def test_a_manifest_with_everything() -> None:
    step = {**TO_BROKER, "delivery": {"retry": 3}}
    manifest = sequence("http://a/", step, reply=TO_SEQUENCE, channelTemplate={"kind": "KafkaChannel"})
    manifest["metadata"] |= {"namespace": "n", "annotations": {"stagecraft.dev/max-in-flight": "2"}}
    found, problems = read_sequence(manifest)
    assert found is not None, problems.errors
    assert [one.destination.uri or one.destination.name for one in found.steps] == ["http://a/", "default"]
    assert [one.delivery for one in found.steps] == [None, DeliverySpec(retry=3)]
    assert (found.max_in_flight, found.reply) == (2, Destination("", "flows.knative.dev/v1", "Sequence", "s", "n"))
    assert "channelTemplate has no effect" in str(problems.warnings[0])


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ({}, "missing field(s): spec.steps"),
        ({"steps": []}, "missing field(s): spec.steps"),
        ({"steps": ["x"]}, "spec.steps[0]"),
        ({"steps": [{}]}, "spec.steps[0].ref"),
        ({"steps": [{"uri": "http://a", "delivery": {"retry": -1}}]}, "spec.steps[0].delivery.retry"),
        ({"steps": [{"uri": "http://a", "retry": 1}]}, "spec.steps[0].retry"),
        ({"steps": [{"uri": "http://a"}], "reply": {}}, "spec.reply.ref"),
        ({"steps": [{"uri": "http://a"}], "replies": {}}, "spec.replies"),
    ],
)
def test_what_is_wrong_is_named(spec: dict[str, Any], complaint: str) -> None:
    found, problems = read_sequence({**sequence(), "spec": spec})
    assert found is None
    assert complaint in " ".join(str(error) for error in problems.errors)


def _counted(cluster: Any, name: str) -> dict[str, Any]:
    return next(one for one in cluster.platform.status()["triggers"] if one["name"] == name)


def _names(cluster: Any) -> list[str]:
    return [one["metadata"]["name"] for one in cluster.platform.get("trigger", None)]
