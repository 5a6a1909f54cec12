"""One revision with real processes: crashes and their back-off, limits, and the place of the activator."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from typing import Any

import psutil

Start = Callable[..., Any]
Service = Callable[..., dict[str, Any]]
Until = Callable[..., Any]

WAIT_S = 30.0
ZERO = {"allow-zero-initial-scale": "true", "initial-scale": "0", "stable-window": "6s"}


async def test_a_replica_that_is_killed_is_started_again(start: Start, service: Service, until: Until) -> None:
    cluster = await start()
    await cluster.apply(service("tough"))
    first = await cluster.ask("tough")
    os.kill(first["pid"], signal.SIGKILL)
    await until(lambda: cluster.status("tough")["pods"][0]["restarts"] == 1)
    assert (await cluster.ask("tough"))["pid"] != first["pid"]
    assert cluster.status("tough")["failed"] == 0


async def test_a_command_that_crashes_at_start_is_told_in_status_log_and_answer(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start()
    await cluster.apply(service("broken", CRASH="cannot read weights.bin"))
    await until(lambda: cluster.status("broken")["state"] == "Failed")
    status = cluster.status("broken")
    assert (status["failed"], status["ready"]) == (1, 0)
    assert "exit code 1, last printed: cannot read weights.bin; back-off of 10 s until" in status["message"]
    code, text = await cluster.get("broken")
    assert (code, "broken cannot start: ended with exit code 1" in text) == (503, True)
    condition = cluster.condition("broken")
    assert (condition["status"], "weights.bin" in condition["message"]) == ("False", True)
    warned = [one for one in cluster.events if one["event"] == "process_ended"]
    assert [one["restart_in_s"] for one in warned] == [0, 10]
    logs = cluster.platform.logs("default", "broken")
    assert "cannot read weights.bin" in logs[-1].path.read_text()


async def test_requests_held_at_zero_are_told_why_nothing_starts(
    start: Start, service: Service, settings_of: Callable[..., Any]
) -> None:
    cluster = await start()
    await cluster.apply(settings_of(**ZERO), service("broken", CRASH="out of luck"))
    answers = await asyncio.gather(*(cluster.get("broken") for _ in range(5)))
    assert {code for code, _ in answers} == {503}
    assert all("out of luck" in text for _, text in answers)


async def test_a_crashing_service_that_is_mended_serves(start: Start, service: Service, until: Until) -> None:
    cluster = await start()
    await cluster.apply(service("mended", CRASH="bad"))
    await until(lambda: cluster.status("mended")["state"] == "Failed")
    await cluster.apply(service("mended", TEXT="good"))
    await until(cluster.ready("mended"))
    assert (await cluster.ask("mended"))["text"] == "good"
    assert cluster.condition("mended")["status"] == "True"


async def test_container_concurrency_queues_ten_times_as_many_and_refuses_the_rest(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start()
    limits = {"max-scale": "1", "target-burst-capacity": "0"}
    await cluster.apply(service("narrow", annotations=limits, spec={"containerConcurrency": 1}))
    await until(cluster.ready("narrow"))
    answers = await asyncio.gather(*(cluster.get("narrow", "/slow?0.05") for _ in range(20)))
    codes = [code for code, _ in answers]
    assert (codes.count(200), codes.count(503)) == (11, 9)


async def test_the_activator_leaves_the_path_when_there_is_capacity_to_spare(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start(clock=True)
    spare = {"target": "100", "target-burst-capacity": "10", "window": "6s"}
    await cluster.apply(service("spare", annotations=spare))
    await until(cluster.ready("spare"))
    await cluster.turn(4)
    assert cluster.status("spare")["mode"] == "serve"
    assert (await cluster.ask("spare"))["text"] == "hello"
    held = [asyncio.create_task(cluster.ask("spare", "/slow?1")) for _ in range(95)]
    await until(lambda: cluster.status("spare")["in_flight"] == 95)
    await cluster.turn(2)
    assert cluster.status("spare")["mode"] == "proxy"
    assert len(await asyncio.gather(*held)) == 95


async def test_requests_of_the_direct_path_keep_a_revision_awake(start: Start, service: Service, until: Until) -> None:
    cluster = await start(clock=True)
    direct = {"target-burst-capacity": "0", "window": "6s"}
    await cluster.apply(service("awake", annotations=direct))
    await until(cluster.ready("awake"))
    await cluster.turn(2)
    held = asyncio.create_task(cluster.ask("awake", "/slow?1"))
    await until(lambda: cluster.status("awake")["in_flight"] == 1)
    await cluster.turn(60)
    assert cluster.status("awake")["ready"] == 1
    assert cluster.status("awake")["stable"] == 1.0
    await held
    await cluster.turn_until(lambda: not cluster.status("awake")["pods"])


async def test_a_start_that_takes_longer_than_the_response_start_limit_answers_504(
    start: Start, service: Service, settings_of: Callable[..., Any]
) -> None:
    cluster = await start()
    limits = {"timeoutSeconds": 2, "responseStartTimeoutSeconds": 1}
    await cluster.apply(settings_of(**ZERO), service("late", spec=limits, START_S="3"))
    assert await cluster.get("late") == (504, "activator request timeout")


async def test_services_that_share_a_preload_share_one_interpreter(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(*(service(f"s{number}") for number in range(3)))
    await asyncio.gather(*(cluster.ask(f"s{number}") for number in range(3)))
    agents = [one for one in cluster.events if one["event"] == "agent_started"]
    assert [one["preload"] for one in agents] == [["http.server", "json"]]


async def test_a_grpc_connection_during_the_drain_of_the_last_replica_wakes_another(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start(clock=True, drain_quiet_s=600.0)
    await cluster.apply(service("two", annotations={"window": "6s"}))
    await until(cluster.ready("two"))
    await cluster.turn_until(lambda: cluster.status("two")["draining"] == 1)
    (revision,) = cluster.revisions
    async with asyncio.timeout(WAIT_S), revision.connect() as replica:
        assert replica.ready
    assert (cluster.status("two")["ready"], cluster.status("two")["draining"]) == (1, 1)


async def test_a_service_deleted_while_it_starts_answers_who_waits_and_gives_all_back(
    start: Start, service: Service, settings_of: Callable[..., Any], until: Until
) -> None:
    cluster = await start()
    await cluster.apply(settings_of(**ZERO), service("first"))
    await cluster.ask("first")  # from here on nothing is new: the agent runs, the client has its connections
    this = psutil.Process()
    fds = this.num_fds()
    for step in range(12):
        await cluster.apply(service("brief", START_S="60"))
        held = asyncio.create_task(cluster.get("brief"))
        await until(lambda: cluster.status("brief")["waiting"] == 1)
        for _ in range(step % 6):
            await asyncio.sleep(0)
        await cluster.platform.delete("service", "default", "brief")
        assert (await held)[0] == 503
    await until(lambda: this.num_fds() <= fds + 4)
    assert [one["service"] for one in cluster.platform.status()["revisions"]] == ["first"]


async def test_traffic_to_a_revision_that_does_not_exist_is_told(start: Start, service: Service) -> None:
    cluster = await start(default_service="default/lost", grpc_port=0)
    await cluster.apply(service("lost", traffic=[{"revisionName": "lost-00007", "percent": 100}]))
    status, text = await cluster.get("lost")
    assert (status, "no revision in its traffic" in text) == (503, True)
    host, _, port = cluster.platform.grpc.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert await reader.read() == b""
    writer.close()
    assert any(one["event"] == "tunnel_failed" for one in cluster.events)
    assert cluster.condition("lost")["status"] == "False"
