"""Revisions of a service: updates under load, traffic by percent and tag, and a new revision that does not start."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from knative.errors import ValidationError

Start = Callable[..., Any]
Service = Callable[..., dict[str, Any]]
Until = Callable[..., Any]


def shown(cluster: Any, name: str) -> dict[str, Any]:
    """The Service as `kubectl get ksvc -o json` shows it."""
    (one,) = (one for one in cluster.platform.get("service", None) if one["metadata"]["name"] == name)
    return dict(one)


def by_revision(cluster: Any) -> dict[str, dict[str, Any]]:
    return {one["revision"]: one for one in cluster.platform.status()["revisions"]}


async def test_an_update_under_load_fails_no_request_and_ends_the_old_replicas(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start(clock=True)
    await cluster.apply(service("app", annotations={"min-scale": "2"}, TEXT="old"))
    await until(cluster.ready("app", 2))
    pids = [pod["pid"] for pod in cluster.status("app")["pods"]]
    texts: list[str] = []
    done = False

    async def load() -> None:
        while not done:
            texts.append((await cluster.ask("app", "/slow?0.01"))["text"])

    clients = [asyncio.create_task(load()) for _ in range(8)]
    await until(lambda: len(texts) > 20)
    await cluster.apply(service("app", annotations={"min-scale": "2"}, TEXT="new", START_S="0.3"))
    await until(lambda: texts[-1] == "new")
    await cluster.turn_until(lambda: not by_revision(cluster)["app-00001"]["pods"])
    done = True
    await asyncio.gather(*clients)
    first_new = texts.index("new")
    assert set(texts) == {"old", "new"}
    assert texts[first_new + len(clients) :].count("old") == 0  # only what was under way
    assert not any(psutil.pid_exists(pid) for pid in pids)
    status = shown(cluster, "app")["status"]
    assert (status["latestReadyRevisionName"], status["observedGeneration"]) == ("app-00002", 2)


async def test_a_new_revision_that_fails_leaves_the_old_one_serving(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start(clock=True)
    await cluster.apply(service("safe", TEXT="old"))
    await until(cluster.ready("safe"))
    await cluster.apply(service("safe", TEXT="new", CRASH="no such setting: X"))
    await until(lambda: by_revision(cluster)["safe-00002"]["state"] == "Failed")
    assert (await cluster.ask("safe"))["text"] == "old"
    condition = cluster.condition("safe")
    assert (condition["status"], condition["reason"]) == ("False", "RevisionFailed")
    assert "no such setting: X" in condition["message"]
    status = shown(cluster, "safe")["status"]
    assert (status["latestCreatedRevisionName"], status["latestReadyRevisionName"]) == ("safe-00002", "safe-00001")
    assert status["traffic"] == [{"revisionName": "safe-00001", "percent": 100, "latestRevision": True}]
    await cluster.apply(service("safe", TEXT="newest"))
    await until(lambda: shown(cluster, "safe")["status"]["latestReadyRevisionName"] == "safe-00003")
    assert (await cluster.ask("safe"))["text"] == "newest"
    await cluster.turn_until(lambda: not by_revision(cluster)["safe-00002"]["pods"])  # the progress deadline
    assert cluster.condition("safe")["status"] == "True"


async def test_traffic_is_split_by_percent_and_reached_by_tag(start: Start, service: Service, until: Until) -> None:
    cluster = await start()
    await cluster.apply(service("split", revision="split-one", TEXT="one"))
    await until(cluster.ready("split"))
    traffic = [
        {"revisionName": "split-one", "percent": 70, "tag": "stable"},
        {"latestRevision": True, "percent": 30},
        {"latestRevision": True, "percent": 0, "tag": "next"},
    ]
    await cluster.apply(service("split", revision="split-two", traffic=traffic, TEXT="two"))
    await until(lambda: shown(cluster, "split")["status"]["latestReadyRevisionName"] == "split-two")
    answers = [await cluster.ask("split") for _ in range(200)]
    texts = Counter(answer["text"] for answer in answers)
    assert texts["one"] > texts["two"] > 20  # 140 and 60 are expected
    for tag, text in (("stable", "one"), ("next", "two")):
        hosted = {"Host": f"{tag}-split.default.localhost"}
        for url, headers in (
            (f"{cluster.platform.url}/", hosted),
            (f"{cluster.platform.url}/default/split/", {"Knative-Serving-Tag": tag}),
        ):
            async with cluster.client.get(url, headers=headers) as answer:
                assert (await answer.json(content_type=None))["text"] == text


async def test_a_revision_that_gets_its_traffic_back_serves_again(start: Start, service: Service, until: Until) -> None:
    cluster = await start(clock=True)
    await cluster.apply(service("back", revision="back-one", TEXT="one"))
    await until(cluster.ready("back"))
    await cluster.apply(service("back", revision="back-two", TEXT="two"))
    await until(lambda: shown(cluster, "back")["status"]["latestReadyRevisionName"] == "back-two")
    await cluster.turn_until(lambda: not by_revision(cluster)["back-one"]["pods"])
    only_one = [{"revisionName": "back-one", "percent": 100}]
    await cluster.apply(service("back", revision="back-two", traffic=only_one, TEXT="two"))
    assert len(by_revision(cluster)) == 2
    assert (await cluster.ask("back"))["text"] == "one"


async def test_a_revision_name_stands_for_one_template_only(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(service("named", revision="named-one", TEXT="one"))
    with pytest.raises(ValidationError, match="without a name change"):
        await cluster.apply(service("named", revision="named-one", TEXT="two"))
    assert list(by_revision(cluster)) == ["named-one"]


async def test_old_revisions_are_forgotten_one_day(
    start: Start, service: Service, settings_of: Callable[..., Any]
) -> None:
    cluster = await start(clock=True)
    zero = {"initial-scale": "0"}
    await cluster.apply(settings_of(**{"allow-zero-initial-scale": "true"}))
    for number in range(30):
        await cluster.apply(service("many", annotations=zero, TEXT=str(number)))
    assert len(by_revision(cluster)) == 21  # the one that serves and Knative's 20
    assert (await cluster.ask("many"))["text"] == "29"


async def test_changed_settings_reach_running_revisions(
    start: Start, service: Service, settings_of: Callable[..., Any], until: Until
) -> None:
    cluster = await start()
    await cluster.apply(service("app"))
    await until(cluster.ready("app"))
    await cluster.apply(settings_of(**{"min-scale": "2", "max-scale": "3"}))
    await until(cluster.ready("app", 2))
    await cluster.platform.delete("configmap", "knative-serving", "config-autoscaler")
    status = cluster.status("app")
    assert (status["min_scale"], status["max_scale"]) == (0, 0)
