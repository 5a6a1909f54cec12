"""What has gone wrong once: crashes beside healthy replicas, quick deletes, failed updates, connections at zero."""

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

import psutil
import pytest
import yaml

from knative.errors import Unavailable, ValidationError
from knative.images import Command
from knative.platform import Platform, PlatformSettings
from knative.resources.documents import parse_documents

Start = Callable[..., Any]
Service = Callable[..., dict[str, Any]]
Until = Callable[..., Any]
Settings = Callable[..., dict[str, Any]]

WAIT_S = 30.0  # against hangs
ZERO = {"allow-zero-initial-scale": "true", "initial-scale": "0", "stable-window": "6s"}
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"  # what every gRPC client says first
SERVE = f'exec {sys.executable} -m http.server --bind 127.0.0.1 "$PORT"'


@pytest.fixture
def shell(service: Service) -> Service:
    """shell("name", "a script", **as for service): replicas that run it."""

    def manifest(name: str, script: str, **options: Any) -> dict[str, Any]:
        return service(name, image="stagecraft/process", command=["sh", "-c", script], **options)

    return manifest


def phases(cluster: Any, name: str) -> list[str]:
    return sorted(pod["phase"] for pod in cluster.status(name)["pods"])


async def talk(address: str, said: bytes, *, end: bool = True) -> bytes:
    """All that is answered to a connection that says no more than this; with `end` it tells so."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(said)
        if end:
            writer.write_eof()
        async with asyncio.timeout(WAIT_S):
            return await reader.read()
    finally:
        writer.close()


# -- crashes


async def test_a_replica_that_crashes_beside_one_that_starts_fails_no_request(
    start: Start, shell: Service, until: Until, tmp_path: Path
) -> None:
    cluster = await start()
    first = f"mkdir {tmp_path}/first 2>/dev/null && echo $HOSTNAME > {tmp_path}/who"
    wait = f"until [ -s {tmp_path}/who ]; do sleep 0.01; done; [ $(cat {tmp_path}/who) = $HOSTNAME ] && exit 1"
    gate = f"until [ -e {tmp_path}/go ]; do sleep 0.01; done"
    await cluster.apply(shell("two", f"{first}; {wait}; {gate}; {SERVE}", annotations={"min-scale": "2"}))
    await until(lambda: "backoff" in phases(cluster, "two"))
    held = asyncio.create_task(cluster.get("two"))
    await until(lambda: held.done() or cluster.status("two")["waiting"])
    (tmp_path / "go").touch()
    assert (await held)[0] == 200
    assert phases(cluster, "two") == ["backoff", "ready"]


async def test_a_draining_replica_that_crashes_fails_no_request(
    start: Start, shell: Service, until: Until, tmp_path: Path
) -> None:
    cluster = await start(clock=True, drain_quiet_s=600.0)
    gate = tmp_path / "go"
    gate.touch()
    script = f"until [ -e {gate} ]; do sleep 0.01; done; {SERVE}"
    await cluster.apply(shell("one", script, annotations={"window": "6s"}))
    await until(cluster.ready("one"))
    (old,) = cluster.revisions[0].replicas
    await cluster.turn_until(lambda: old.draining)
    gate.unlink()
    held = asyncio.create_task(cluster.get("one"))
    await until(lambda: cluster.status("one")["waiting"])
    old.pod.kill(signal.SIGKILL)
    await until(lambda: old.pod.restarts == 1 and old.pod.pid)  # the first restart is at once
    old.pod.kill(signal.SIGKILL)
    await until(lambda: old.pod.phase == "backoff")
    gate.touch()
    assert (await held)[0] == 200


async def test_a_pod_that_goes_by_itself_is_replaced(start: Start, service: Service, until: Until) -> None:
    cluster = await start(clock=True)
    await cluster.apply(service("one", annotations={"min-scale": "1"}))
    first = await cluster.ask("one")
    (lost,) = cluster.revisions[0].replicas
    lost.pod._life.cancel()  # as a mistake of the kubelet would
    await until(lambda: lost.pod.phase == "gone")
    await cluster.turn_until(cluster.ready("one"))
    assert (await cluster.ask("one"))["pid"] != first["pid"]


@pytest.mark.parametrize("way", ["request", "connection"])
async def test_what_failed_before_zero_is_tried_anew_by_whoever_comes(
    way: str, start: Start, shell: Service, tmp_path: Path
) -> None:
    cluster = await start(clock=True)
    mended = tmp_path / "mended"
    await cluster.apply(shell("one", f"[ -e {mended} ] || exit 1; {SERVE}"))
    await cluster.turn_until(lambda: phases(cluster, "one") == ["backoff"])
    await cluster.turn(660)  # the progress deadline is over
    await cluster.turn_until(lambda: not cluster.status("one")["pods"])
    mended.touch()
    if way == "request":
        assert (await cluster.get("one"))[0] == 200
    async with asyncio.timeout(WAIT_S), cluster.revisions[0].connect() as replica:
        assert replica.ready
    assert (cluster.status("one")["state"], cluster.status("one")["message"]) == ("Active", "")


# -- starts that fail, and deletes in their midst


def held_by_this_process() -> tuple[int, int]:
    """Listening sockets, and ports claimed for replicas."""
    sockets = Path("/proc/self/net/unix").read_text()
    mine = {os.readlink(fd.path) for fd in os.scandir("/proc/self/fd") if os.path.lexists(fd.path)}
    claims = [line.split() for line in sockets.splitlines() if "@knative-port-" in line]
    tcp = [one for one in psutil.net_connections("tcp") if one.pid == os.getpid()]
    return sum(one.status == psutil.CONN_LISTEN for one in tcp), sum(
        f"socket:[{fields[6]}]" in mine for fields in claims
    )


async def test_deletes_in_the_midst_of_starts_leave_no_listener_and_no_port(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start()
    before = held_by_this_process()
    for number in range(20):
        await cluster.apply(service("brief"))
        for _ in range(number % 5):
            await asyncio.sleep(0)
        await cluster.platform.delete("service", "default", "brief")
    assert held_by_this_process() == before


async def test_replicas_that_cannot_listen_leave_nothing_and_are_tried_again_after_a_pause(
    start: Start, service: Service, until: Until, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start(clock=True)
    before = held_by_this_process()

    def refuse(host: str, port: int) -> None:
        raise Unavailable("cannot listen: too many open files")

    def failures() -> int:
        return sum(one["event"] == "replica_failed" for one in cluster.events)

    with monkeypatch.context() as patch:
        patch.setattr("knative.network.listener._bind", refuse)
        await cluster.apply(service("three", annotations={"min-scale": "3"}))
        await until(lambda: failures() == 3)
        await cluster.turn(4)
        assert failures() == 3
        await cluster.turn_until(lambda: failures() == 6)
        assert held_by_this_process() == before
        assert cluster.status("three")["state"] == "Failed"
        assert "too many open files" in cluster.condition("three")["message"]
    await cluster.turn_until(cluster.ready("three", 3))
    assert cluster.condition("three")["status"] == "True"


async def test_what_is_about_to_start_is_not_counted_against_what_serves(
    start: Start, service: Service, settings_of: Settings, until: Until
) -> None:
    cluster = await start(clock=True)
    await cluster.apply(settings_of(**{"min-scale": "1"}), service("one"))
    await until(cluster.ready("one"))
    await cluster.turn(4)
    (revision,) = cluster.revisions
    (serving,) = revision.replicas
    await cluster.apply(settings_of(**{"min-scale": "3"}))
    assert cluster.status("one")["starting"] == 2
    await cluster.apply(settings_of(**{"min-scale": "1"}))  # they are about to start, and not wanted any more
    assert serving.ready
    await until(lambda: len(revision.replicas) > 1)
    await cluster.turn_until(lambda: phases(cluster, "one") == ["ready"] and not cluster.status("one")["starting"])
    assert revision.replicas == [serving]


async def test_a_platform_that_is_cancelled_again_at_each_step_of_its_end_ends_all(
    service: Service, images: dict[str, Command], tmp_path: Path, until: Until
) -> None:
    settings = PlatformSettings(tmp_path, "p", port=0, drain_quiet_s=0.0, gpus=(), images=images)
    platform = Platform(settings)

    async def live() -> None:
        async with platform:
            await platform.apply(parse_documents(yaml.safe_dump(service("one")), "test.yaml"))
            applied.set()
            await asyncio.Event().wait()

    applied = asyncio.Event()
    others = set(psutil.Process().children(recursive=True))
    living = asyncio.create_task(live())
    await applied.wait()
    await until(lambda: any(one["ready"] for one in platform.status()["revisions"]))
    children = psutil.Process().children(recursive=True)
    while not living.done():
        living.cancel()
        await asyncio.sleep(0)
    assert living.cancelled()
    assert not [child for child in children if child not in others and child.is_running()]


# -- updates


async def test_a_broken_update_before_the_first_readiness_leaves_the_healthy_revision_serving(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start()
    await cluster.apply(service("one", START_S="0.3"))
    await cluster.apply(service("one", CRASH="broken"))
    await until(lambda: cluster.revisions[0].was_ready and cluster.status("one")["state"] == "Failed")
    assert (await cluster.ask("one"))["text"] == "hello"
    assert cluster.condition("one")["reason"] == "RevisionFailed"


async def test_a_revision_name_may_come_back_with_its_template_only(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start()
    for name in ("one-a", "one-b"):
        await cluster.apply(service("one", revision=name, TEXT=name))
        await until(lambda: cluster.condition("one")["status"] == "True")
    with pytest.raises(ValidationError, match='revision "one-a" exists with another template'):
        await cluster.apply(service("one", revision="one-a", TEXT="else"))
    assert (await cluster.ask("one"))["text"] == "one-b"
    await cluster.apply(service("one", revision="one-a", TEXT="one-a"))
    await until(lambda: cluster.condition("one")["status"] == "True")
    assert (await cluster.ask("one"))["text"] == "one-a"
    (shown,) = cluster.platform.get("service", None)
    assert shown["status"]["latestCreatedRevisionName"] == "one-a"
    assert sorted(revision.id.name for revision in cluster.revisions) == ["one-a", "one-b"]


async def test_metrics_go_on_when_a_service_is_applied_again_while_it_is_deleted(
    start: Start, service: Service, until: Until
) -> None:
    def counted() -> float:
        name = "kn_serving_invocation_duration_seconds_count{"
        lines = cluster.platform.metrics().decode().splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))

    cluster = await start()
    await cluster.apply(service("one"))
    await cluster.ask("one")
    slow = asyncio.create_task(cluster.ask("one", "/slow?0.5"))
    await until(lambda: cluster.status("one")["in_flight"] == 1)
    deleting = asyncio.create_task(cluster.platform.delete("service", "default", "one"))
    await asyncio.sleep(0)
    await cluster.apply(service("one"))
    for _ in range(5):
        await cluster.ask("one")
    assert not slow.done()
    await asyncio.gather(slow, deleting)
    for _ in range(5):
        await cluster.ask("one")
    assert counted() >= 10


@pytest.mark.parametrize("namespace", ["default", "knative-eventing"])
async def test_config_maps_of_other_namespaces_set_nothing(
    namespace: str, start: Start, service: Service, settings_of: Settings
) -> None:
    cluster = await start()
    other = settings_of(**{"container-concurrency-target-default": "10"})
    features = settings_of(**{"new-trigger-filters": "enabled", "multi-container": "Enabled"})
    features["metadata"]["name"] = "config-features"
    for config_map in (other, features):
        config_map["metadata"]["namespace"] = namespace
    await cluster.apply(settings_of(**{"container-concurrency-target-default": "20"}), service("one"))
    assert cluster.status("one")["target"] == 14
    await cluster.apply(other, features)
    assert cluster.status("one")["target"] == 14


# -- connections that are no HTTP/1.1


async def test_who_only_looks_whether_somebody_listens_wakes_nothing(
    start: Start, service: Service, settings_of: Settings
) -> None:
    cluster = await start(clock=True, grpc_port=0, default_service="default/one")
    await cluster.apply(settings_of(**ZERO), service("one"))
    for said in (b"", PREFACE[:-1]):
        assert await talk(cluster.platform.grpc, said) == b""
    await cluster.turn(4)
    assert cluster.status("one")["pods"] == []
    assert not [one for one in cluster.events if one["event"] == "scale_up" and one["replicas"]]


async def test_a_failing_revision_refuses_connections(start: Start, service: Service) -> None:
    cluster = await start(grpc_port=0, default_service="default/one")
    await cluster.apply(service("one", image="nowhere/nothing"))
    assert await talk(cluster.platform.grpc, PREFACE) == b""
    (refused,) = (one for one in cluster.events if one["event"] == "tunnel_failed")
    assert "no command on this machine for image nowhere/nothing" in refused["error"]


async def test_connections_follow_the_traffic_and_not_a_tag_without_a_share(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start(grpc_port=0, default_service="default/one")
    await cluster.apply(service("one", revision="one-a"))
    await until(cluster.ready("one"))
    traffic = [{"tag": "new", "revisionName": "one-b", "percent": 0}, {"revisionName": "one-a", "percent": 100}]
    await cluster.apply(service("one", revision="one-b", traffic=traffic))
    await until(cluster.ready("one"))
    async with cluster.platform._connect_default() as replica:
        assert replica.name.startswith("one-a-")


async def test_a_wake_while_the_last_replica_drains_starts_another(
    start: Start, service: Service, until: Until
) -> None:
    cluster = await start(clock=True, drain_quiet_s=600.0)
    await cluster.apply(service("one", annotations={"window": "6s"}))
    await until(cluster.ready("one"))
    await cluster.turn_until(lambda: phases(cluster, "one") == ["draining"])
    cluster.platform.wake(["one"], "default")
    await until(lambda: phases(cluster, "one") == ["draining", "ready"])


# -- what is printed


async def test_a_malformed_request_prints_no_trace_and_a_mistake_of_ours_does(
    start: Start, service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = await start()
    address = cluster.platform.url.removeprefix("http://")
    for line in (b"GET http://a:99999/ HTTP/1.1\r\nHost: a", b"\x16\x03\x01 TLS", b"GET / HTTP/1.1\r\nHost : a"):
        assert b" 400 Bad Request\r\n" in await talk(address, line + b"\r\n\r\n", end=False)
    assert caplog.records == []

    async def fail(request: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cluster.platform._ingress._listener, "_handler", fail)
    assert b" 500 " in await talk(address, b"GET / HTTP/1.1\r\nHost: a\r\n\r\n", end=False)
    assert "ZeroDivisionError" in caplog.text


def test_however_often_ctrl_c_is_pressed_all_ends_and_no_trace_is_printed(
    root: Path, tmp_path: Path, shell: Service
) -> None:
    never = shell("one", "exec sleep 600")
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(never))
    env = {**os.environ, "PYTHONPATH": str(root), "XDG_RUNTIME_DIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    options = ("-f", f"{tmp_path}/one.yaml", "--name", "often", "--port", "0", "--json")
    argv = (sys.executable, "-m", "orchestrator.cli", "local", "start", *options)
    with (tmp_path / "printed").open("w+") as printed:
        platform = subprocess.Popen(argv, env=env, stdout=subprocess.PIPE, stderr=printed, text=True, cwd=tmp_path)
        children: list[psutil.Process] = []
        try:
            assert platform.stdout is not None
            facts = json.loads(platform.stdout.readline())
            asyncio.run(interrupt(facts["url"].removeprefix("http://"), platform, children))
            assert platform.wait(WAIT_S) in (0, -signal.SIGINT)  # the latter by one after its loop has ended
        finally:
            platform.kill()
            platform.communicate()
        printed.seek(0)
        # a trace is no JSON, and neither is what it says of the request that is waited for
        events = [json.loads(line) for line in printed if not line.startswith("stopping: 1 request is running")]
    assert {one["level"] for one in events} <= {"info", "warning"}
    assert children
    assert not [one for one in children if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]


async def interrupt(address: str, platform: subprocess.Popen[str], children: list[psutil.Process]) -> None:
    """While a request waits, which the first Ctrl-C gives time."""
    host, _, port = address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /default/one HTTP/1.1\r\nHost: a\r\n\r\n")
    process = psutil.Process(platform.pid)
    async with asyncio.timeout(WAIT_S):
        # another process, and the request before it, set no event
        while "sleep" not in [child.name() for child in process.children(recursive=True)]:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    children += process.children(recursive=True)
    platform.send_signal(signal.SIGINT)
    async with asyncio.timeout(WAIT_S):
        while platform.poll() is None:
            await asyncio.sleep(0.02)
            platform.send_signal(signal.SIGINT)
    writer.close()
