"""The platform's metrics: Knative's names, right values, and no series of what is gone."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

Start = Callable[..., Any]
Service = Callable[..., dict[str, Any]]
Until = Callable[..., Any]
ZERO = {"allow-zero-initial-scale": "true", "initial-scale": "0"}


def samples(cluster: Any, service: str) -> dict[str, float]:
    """Of one service; the status code is added to the name of those that have one."""
    found = {}
    for family in text_string_to_metric_families(cluster.platform.metrics().decode()):
        for sample in family.samples:
            if sample.labels.get("kn_service_name") == service and "le" not in sample.labels:
                code = sample.labels.get("http_response_status_code", "")
                found[sample.name + (f"_{code}" if code else "")] = sample.value
    return found


async def test_values_are_those_of_the_autoscaler(start: Start, service: Service, until: Until) -> None:
    cluster = await start(clock=True)
    await cluster.apply(service("counted", annotations={"target": "10", "max-scale": "2", "min-scale": "1"}))
    await until(cluster.ready("counted"))
    held = [asyncio.create_task(cluster.ask("counted", "/slow?1")) for _ in range(5)]
    await until(lambda: cluster.status("counted")["in_flight"] == 5)
    await cluster.turn(6)
    seen = samples(cluster, "counted")
    assert {name: seen[name] for name in seen if name.startswith("kn_revision_")} | {"_": 0} == {
        "kn_revision_pods_desired": 1,
        "kn_revision_pods_requested": 1,
        "kn_revision_pods_count": 1,
        "kn_revision_pods_not_ready_count": 0,
        "kn_revision_pods_pending_count": 0,
        "kn_revision_pods_terminating_count": 0,
        "kn_revision_panic_mode": 0,
        "kn_revision_concurrency_target": 7,
        "kn_revision_concurrency_stable": seen["kn_revision_concurrency_stable"],
        "kn_revision_concurrency_panic": seen["kn_revision_concurrency_panic"],
        "kn_revision_capacity_excess": 10 - 211 - 5,
        "kn_revision_request_concurrency": 5,
        "_": 0,
    }
    assert 4 < seen["kn_revision_concurrency_panic"] <= 5
    assert seen["kn_serving_queue_depth"] == 5
    await asyncio.gather(*held)
    await until(lambda: "kn_serving_invocation_duration_seconds_count_200" in samples(cluster, "counted"))
    seen = samples(cluster, "counted")
    assert seen["kn_serving_invocation_duration_seconds_count_200"] == 5
    assert seen["kn_serving_invocation_duration_seconds_sum_200"] >= 5


async def test_answers_are_counted_by_their_status(start: Start, service: Service, until: Until) -> None:
    cluster = await start(clock=True)
    limits = {"timeoutSeconds": 1, "responseStartTimeoutSeconds": 1}
    await cluster.apply(service("codes", annotations={"target-burst-capacity": "0"}, spec=limits))
    await until(cluster.ready("codes"))
    await cluster.ask("codes")
    await cluster.turn_until(lambda: cluster.status("codes")["mode"] == "serve")
    assert (await cluster.get("codes", "/slow?2"))[0] == 504
    await until(lambda: "kn_serving_invocation_duration_seconds_count_504" in samples(cluster, "codes"))
    assert samples(cluster, "codes")["kn_serving_invocation_duration_seconds_count_200"] == 1


async def test_only_wakes_from_zero_are_cold_starts(
    start: Start, service: Service, settings_of: Callable[..., Any], until: Until
) -> None:
    cluster = await start(clock=True)
    quick = {**ZERO, "stable-window": "6s", "scale-to-zero-grace-period": "1s"}
    await cluster.apply(settings_of(**quick), service("cold"), service("warm", annotations={"min-scale": "1"}))
    await until(cluster.ready("warm"))
    for _ in range(2):
        await asyncio.gather(*(cluster.ask(name) for name in ("cold", "warm") * 3))
        await cluster.turn_until(lambda: not cluster.status("cold")["pods"])
    assert samples(cluster, "cold")["stagecraft_cold_starts_total"] == 2
    assert samples(cluster, "warm").get("stagecraft_cold_starts_total", 0) == 0


async def test_a_deleted_service_has_no_series_left(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(service("gone"), service("kept"))
    await asyncio.gather(cluster.ask("gone"), cluster.ask("kept"))
    assert samples(cluster, "gone")
    await cluster.platform.delete("service", "default", "gone")
    assert samples(cluster, "gone") == {}
    assert samples(cluster, "kept")["kn_revision_pods_count"] == 1


async def test_they_are_served_for_prometheus(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(service("scraped"))
    async with cluster.client.get(cluster.platform.metrics_url) as answer:
        text = await answer.text()
        assert answer.headers["Content-Type"].startswith("text/plain; version=")
    labels = 'k8s_namespace_name="default",kn_configuration_name="scraped",kn_revision_name="scraped-00001"'
    assert labels in text
    async with cluster.client.get(cluster.platform.metrics_url + "x") as answer:
        assert answer.status == 404
