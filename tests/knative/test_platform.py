"""A platform with small real services: from zero and back, out and in, what it shows and what it leaves behind."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from knative.errors import NotFound, Unavailable, ValidationError
from knative.platform import Platform, PlatformSettings

Start = Callable[..., Any]
Service = Callable[..., dict[str, Any]]
Until = Callable[..., Any]

ZERO = {"allow-zero-initial-scale": "true", "initial-scale": "0", "stable-window": "6s"}


async def test_the_first_request_wakes_and_quiet_ends_the_last_replica(
    start: Start, service: Service, settings_of: Callable[..., Any]
) -> None:
    cluster = await start(clock=True)
    await cluster.apply(settings_of(**ZERO, **{"scale-to-zero-grace-period": "2s"}), service("one"))
    await cluster.turn(4)
    assert (cluster.status("one")["ready"], cluster.status("one")["starting"]) == (0, 0)
    first = await cluster.ask("one")
    assert cluster.status("one")["ready"] == 1
    await cluster.turn_until(lambda: not cluster.status("one")["pods"])
    assert not psutil.pid_exists(first["pid"])
    await cluster.turn(20)
    assert cluster.status("one")["pods"] == []
    again = await cluster.ask("one")
    assert (again["text"], again["pid"] != first["pid"]) == (first["text"], True)


async def test_load_scales_out_as_far_as_max_scale_and_back(start: Start, service: Service, until: Until) -> None:
    cluster = await start(clock=True)
    few = {"target": "2", "max-scale": "3", "window": "6s"}
    await cluster.apply(service("some", annotations=few))
    await until(cluster.ready("some"))
    asked = [asyncio.create_task(cluster.ask("some", "/slow?1.5")) for _ in range(40)]
    await until(lambda: cluster.status("some")["in_flight"] + cluster.status("some")["waiting"] >= 40)
    for _ in range(4):
        await cluster.turn(1)
        await asyncio.sleep(0.05)
    await until(cluster.ready("some", 3))
    answers = await asyncio.gather(*asked)
    assert {answer["text"] for answer in answers} == {"hello"}
    pids = {(await cluster.ask("some"))["pid"] for _ in range(30)}
    assert len(pids) > 1
    await cluster.turn_until(lambda: not cluster.status("some")["pods"])
    assert all(not psutil.pid_exists(pid) for pid in pids)


async def test_a_request_at_zero_wakes_the_services_it_will_need(
    start: Start, service: Service, settings_of: Callable[..., Any]
) -> None:
    cluster = await start()
    needed = [service(name, START_S="0.5") for name in ("stage-0", "stage-1")]
    front = service("front", metadata={"stagecraft.dev/wakes": "stage-0, stage-1, not-there"}, START_S="0.5")
    await cluster.apply(settings_of(**ZERO), front, *needed)
    await cluster.ask("front")
    names = [(one["event"], one["pod"][:5]) for one in cluster.events if one["event"].startswith("process_")]
    started = [name for event, name in names if event == "process_started"]
    assert sorted(started) == ["front", "stage", "stage"]
    first_ready = [event for event, _ in names].index("process_ready")
    assert first_ready == 3  # none waited for another


@pytest.mark.parametrize("way", ["chunked", "announced"])
@pytest.mark.parametrize("capacity", ["0", "-1"], ids=["past the activator", "through the activator"])
async def test_a_body_that_its_replica_did_not_end_is_cut(
    way: str, capacity: str, start: Start, service: Service, until: Until
) -> None:
    """Whoever reads it can tell that from an end."""
    cluster = await start()
    await cluster.apply(service("cut", annotations={"target-burst-capacity": capacity}))
    await until(cluster.ready("cut"))
    pid = (await cluster.ask("cut"))["pid"]
    async with cluster.client.get(f"{cluster.platform.url}/default/cut/{way}?1000000") as answer:
        assert await answer.content.readexactly(5) == b"begun"
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(aiohttp.ClientPayloadError):
            await answer.content.read()


async def test_a_gpu_that_is_taken_is_waited_for_with_a_reason(start: Start, service: Service, until: Until) -> None:
    cluster = await start(gpus=("7",))
    two = {"min-scale": "2", "max-scale": "2"}
    await cluster.apply(service("gpu", annotations=two, limits={"nvidia.com/gpu": "1"}))
    await until(cluster.ready("gpu"))
    env = (await cluster.ask("gpu", "/env"))["env"]
    assert env["CUDA_VISIBLE_DEVICES"] == "7"
    (waiting,) = (pod for pod in cluster.status("gpu")["pods"] if pod["phase"] == "pending")
    assert waiting["message"] == "waiting for a GPU: 0/1 nvidia.com/gpu available, 1 asked for"
    running = next(pod["pid"] for pod in cluster.status("gpu")["pods"] if pod["pid"])
    os.kill(running, signal.SIGKILL)
    await until(lambda: cluster.status("gpu")["ready"] == 1 and cluster.status("gpu")["pods"][0]["pid"] != running)


async def test_a_stream_passes_line_by_line(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(service("lines"))
    async with cluster.client.get(f"{cluster.platform.url}/default/lines/stream?20") as answer:
        assert await answer.content.readline() == b"0\n"
        seen = cluster.status("lines")["in_flight"]
        rest = await answer.text()
    assert seen == 1  # its end had not come yet
    assert rest.splitlines() == [str(number) for number in range(1, 20)]


async def test_replicas_know_who_they_are_and_reach_others_by_name(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(service("who"), service("other", TEXT="from the other"))
    env = (await cluster.ask("who", "/env"))["env"]
    pod = cluster.status("who")["pods"][0]
    assert {key: env[key] for key in ("K_SERVICE", "K_CONFIGURATION", "K_REVISION", "HOSTNAME", "POD_ADDRESS")} == {
        "K_SERVICE": "who",
        "K_CONFIGURATION": "who",
        "K_REVISION": "who-00001",
        "HOSTNAME": pod["name"],
        "POD_ADDRESS": pod["address"],
    }
    proxy = env["http_proxy"]
    async with cluster.client.get("http://other.default.svc.cluster.local/", proxy=proxy) as answer:
        assert (await answer.json(content_type=None))["text"] == "from the other"


async def test_a_pinned_replica_answers_at_its_own_address_and_is_counted(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start()
    await cluster.apply(service("own"))
    await until(cluster.ready("own"))
    address = cluster.status("own")["pods"][0]["address"]
    asked = asyncio.create_task(cluster.client.get(f"http://{address}/slow?0.5"))
    await until(lambda: cluster.status("own")["pods"][0]["in_flight"] == 1)
    async with await asked as answer:
        assert answer.status == 200
    await until(lambda: cluster.status("own")["pods"][0]["in_flight"] == 0)


async def test_the_status_has_what_stagecraft_status_and_top_show(start: Start, service: Service, until: Until) -> None:
    cluster = await start()
    await cluster.apply(service("shown", annotations={"target": "10", "min-scale": "1", "max-scale": "4"}))
    await until(cluster.ready("shown"))
    await until(lambda: cluster.status("shown")["stable"] is not None)
    status = json.loads(json.dumps(cluster.platform.status()))
    assert status["platform"]["pid"] == os.getpid()
    assert status["platform"]["url"] == cluster.platform.url
    (one,) = status["revisions"]
    expected = {
        "namespace": "default", "service": "shown", "revision": "shown-00001", "generation": 1, "state": "Active",
        "desired": 1, "ready": 1, "starting": 0, "draining": 0, "failed": 0, "not_ready": 0, "stable": 0.0,
        "panic": 0.0, "target": 7.0, "metric": "concurrency", "panic_mode": False, "waiting": 0, "in_flight": 0,
        "min_scale": 1, "max_scale": 4, "message": "",
    }  # fmt: skip
    assert {key: one[key] for key in expected} == expected
    (pod,) = one["pods"]
    assert (pod["phase"], pod["restarts"], pod["in_flight"]) == ("ready", 0, 0)
    assert psutil.Process(pod["pid"]).is_running()


async def test_every_change_of_scale_is_logged_with_its_reason(
    start: Start, service: Service, settings_of: Callable[..., Any]
) -> None:
    cluster = await start(clock=True)
    await cluster.apply(settings_of(**ZERO, **{"scale-to-zero-grace-period": "1s"}), service("said"))
    await cluster.ask("said")
    await cluster.turn_until(lambda: not cluster.status("said")["pods"])
    by_event = {one["event"]: one for one in cluster.events}
    decided = [one for one in cluster.events if one["event"] == "scale"]
    assert [one["desired"] for one in decided] == [1, 0]
    assert "an average of" in decided[0]["reason"]
    assert by_event["scale_up"]["replicas"] == 1
    assert by_event["scale_down"]["replicas"] == 0
    assert "grace period" in by_event["scale_down"]["reason"]
    assert by_event["replica_gone"]["revision"] == "said-00001"


async def test_a_deleted_service_answers_what_it_has_and_is_gone(start: Start, service: Service, until: Until) -> None:
    cluster = await start()
    await cluster.apply(service("brief"))
    pid = (await cluster.ask("brief"))["pid"]
    asked = asyncio.create_task(cluster.ask("brief", "/slow?0.5"))
    await until(lambda: cluster.status("brief")["in_flight"] == 1)
    await cluster.platform.delete("service", "default", "brief")
    assert (await asked)["text"] == "hello"
    assert not psutil.pid_exists(pid)
    assert cluster.platform.status()["revisions"] == []
    assert (await cluster.get("brief"))[0] == 404
    with pytest.raises(NotFound):
        await cluster.platform.delete("service", "default", "brief")


async def test_running_answers_end_before_the_platform_does(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(service("last"))
    pid = (await cluster.ask("last"))["pid"]
    async with cluster.client.get(f"{cluster.platform.url}/default/last/stream?20") as answer:
        await answer.content.readline()
        closing = asyncio.create_task(cluster.platform.__aexit__(None, None, None))
        rest = await answer.text()
        await closing
    assert rest.splitlines()[-1] == "19"
    assert not psutil.pid_exists(pid)
    with pytest.raises(aiohttp.ClientConnectorError):
        await cluster.get("last")


async def test_two_platforms_do_not_disturb_each_other(start: Start, service: Service) -> None:
    one, two = await start(), await start()
    await asyncio.gather(one.apply(service("same", TEXT="one")), two.apply(service("same", TEXT="two")))
    answers = await asyncio.gather(*(cluster.ask("same") for cluster in (one, two) * 5))
    assert [answer["text"] for answer in answers] == ["one", "two"] * 5
    await one.platform.__aexit__(None, None, None)
    assert (await two.ask("same"))["text"] == "two"


async def test_a_taken_port_is_refused_and_nothing_is_left(start: Start, tmp_path: Path) -> None:
    first = await start()
    port = int(first.platform.url.rpartition(":")[2])
    before = len(os.listdir("/proc/self/fd"))
    for ports in ({"port": port}, {"port": 0, "metrics_port": port}, {"port": 0, "grpc_port": port}):
        settings = PlatformSettings(folder=tmp_path / "second", name="second", gpus=(), **ports)
        with pytest.raises(Unavailable, match=rf"cannot listen on 127.0.0.1:{port}: .*in use"):
            await Platform(settings).__aenter__()
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_folder_that_cannot_be_made_is_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    settings = PlatformSettings(folder=tmp_path / "file" / "logs", name="x", port=0, gpus=())
    with pytest.raises(Unavailable, match=r"cannot use the folder .*logs: Not a directory"):
        await Platform(settings).__aenter__()


async def test_manifests_with_a_mistake_change_nothing(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(service("good", TEXT="old"))
    wrong = service("bad")
    wrong["spec"]["template"]["spec"]["containerConcurrency"] = -1
    with pytest.raises(ValidationError, match="containerConcurrency"):
        await cluster.apply(service("good", TEXT="new"), wrong)
    assert (await cluster.ask("good"))["text"] == "old"
    assert [one["metadata"]["name"] for one in cluster.platform.get("service", None)] == ["good"]


async def test_apply_says_what_became_of_each_object(start: Start, service: Service, settings_of: Any) -> None:
    cluster = await start()
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "j"}}
    done = await cluster.apply(settings_of(**{"max-scale": "2"}), service("a"), service("b"), job)
    assert {(one.name, one.action) for one in done} == {
        ("config-autoscaler", "created"), ("a", "created"), ("b", "created"), ("j", "skipped"),
    }  # fmt: skip
    again = await cluster.apply(service("a"), service("b", TEXT="other"))
    assert [(one.name, one.action) for one in again] == [("a", "unchanged"), ("b", "configured")]
    assert cluster.status("a")["max_scale"] == 2


async def test_the_default_service_gets_what_names_no_service(start: Start, service: Service) -> None:
    cluster = await start(default_service="default/front")
    async with cluster.client.get(f"{cluster.platform.url}/v1/models") as answer:
        assert answer.status == 404
    await cluster.apply(service("front"))
    async with cluster.client.get(f"{cluster.platform.url}/v1/models?x=1") as answer:
        assert (await answer.json(content_type=None))["path"] == "/v1/models?x=1"


async def test_an_image_without_a_command_is_told_to_whoever_asks(start: Start, service: Service) -> None:
    cluster = await start()
    await cluster.apply(service("unknown", image="acme/unknown:1"))
    assert cluster.status("unknown")["state"] == "Failed"
    condition = cluster.condition("unknown")
    assert (condition["status"], condition["reason"]) == ("False", "RevisionFailed")
    assert "no command on this machine for image acme/unknown:1" in condition["message"]
    status, text = await cluster.get("unknown")
    assert (status, "acme/unknown:1" in text) == (503, True)


SETTLED = 60  # cycles after which as many logs are kept as ever will be
LEAK_BYTES_MAX = 8 << 20


@pytest.mark.parametrize("cycles", [100, pytest.param(200, marks=pytest.mark.slow)])
async def test_cycles_leave_nothing_behind(
    start: Start, service: Service, settings_of: Callable[..., Any], tmp_path: Path, cycles: int
) -> None:
    cluster = await start(clock=True)
    quick = {**ZERO, "scale-to-zero-grace-period": "1s"}
    await cluster.apply(settings_of(**quick), service("cycle"))
    this = psutil.Process()
    seen: list[tuple[int, int, int]] = []  # open files and sockets, processes, files on disk
    rss: list[int] = []
    for number in range(cycles):
        assert (await cluster.ask("cycle"))["text"] == "hello"
        await cluster.turn_until(lambda: not cluster.status("cycle")["pods"])
        cluster.events.clear()
        if number % 10 == 9:
            files = sum(1 for path in (tmp_path / "p0").rglob("*") if path.is_file())
            seen.append((this.num_fds(), len(this.children(recursive=True)), files))
            rss.append(this.memory_info().rss)
    settled = SETTLED // 10 - 1
    fds, children, files = seen[settled]
    for later in seen[settled:]:
        assert later[0] <= fds + 2, seen
        assert later[1:] == (children, files), seen
    assert rss[-1] - rss[settled] < LEAK_BYTES_MAX


# a process of its own, to be killed
PLATFORM = """
import asyncio, json, sys
from pathlib import Path
import structlog
from knative.images import Command
from knative.platform import Platform, PlatformSettings
from knative.resources.documents import parse_documents

async def main():
    folder, row, manifest = Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3]
    settings = PlatformSettings(folder=folder, name="x", port=0, gpus=(), images={"tests/server": Command(**row)})
    async with Platform(settings) as platform:
        await platform.apply(parse_documents(manifest, "m.yaml"))
        while not platform.status()["revisions"][0]["ready"] == 2:
            await asyncio.sleep(0.01)
        print(json.dumps({"url": platform.url, "status": platform.status()["revisions"][0]}), flush=True)
        await asyncio.sleep(600)

structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
asyncio.run(main())
"""


def test_kill_9_leaves_no_process_and_nobody_listening(
    images: dict[str, Any], service: Service, tmp_path: Path, root: Path
) -> None:
    command = images["tests/server"]
    row = {"module": command.module, "preload": command.preload, "env": dict(command.env)}
    manifest = json.dumps(service("doomed", annotations={"min-scale": "2"}))
    argv = [sys.executable, "-c", PLATFORM, str(tmp_path), json.dumps(row), manifest]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}) as process:
        assert process.stdout is not None
        facts = json.loads(process.stdout.readline())
        family = psutil.Process(process.pid).children(recursive=True)
        addresses = [facts["url"].removeprefix("http://"), *(pod["address"] for pod in facts["status"]["pods"])]
        ports = {int(address.rpartition(":")[2]) for address in addresses}
        replicas = {child.pid for child in family}
        ports |= {one.laddr.port for one in psutil.net_connections("tcp") if one.pid in replicas}
        process.kill()
    assert {pod["pid"] for pod in facts["status"]["pods"]} <= {child.pid for child in family}
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    listening = {one.laddr.port for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN}
    assert len(ports) == 5
    assert not ports & listening
