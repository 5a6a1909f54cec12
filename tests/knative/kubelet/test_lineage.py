"""Nothing outlives the platform, nor an agent, nor a replica: not even what has left its session."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

ROOT = Path(__file__).resolve().parents[3]
WAIT_S = 30.0  # against hangs
# listens, and starts two helpers in sessions of their own: one stays its child, one is orphaned at once
FAMILY = """
import os, pathlib, socket, subprocess, sys, time
folder = pathlib.Path(sys.argv[1])
listener = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
helper = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(600)"
argv = [sys.executable, "-S", "-c", helper, str(folder / f"{os.getpid()}.child")]
subprocess.Popen(argv, start_new_session=True)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        # holds the replica's port open
        (folder / f"{os.getppid()}.orphan").write_text(str(os.getpid()))
        time.sleep(600)
    os._exit(0)
os.wait()
print("up", flush=True)
time.sleep(600)
"""
PLATFORM = """
import asyncio, sys
from pathlib import Path
from knative.images import Command
from knative.kubelet.kubelet import Kubelet
from knative.kubelet.pod import PodSpec
from knative.resources.objects import Probe

async def main():
    folder, code = Path(sys.argv[1]), sys.argv[2]
    kubelet = Kubelet(folder, gpus=())
    await kubelet.start()
    await kubelet.warm(("json",))
    command = Command(argv=(sys.executable, "-S", "-c", code, str(folder)))
    pods = [
        kubelet.run(PodSpec(f"p{i}", command, {}, Probe("tcp"), None, None, 600), kubelet.port()) for i in range(2)
    ]
    while not all(pod.phase == "ready" for pod in pods) or len(list(folder.glob("*.*"))) < 4:
        await asyncio.sleep(0.01)
    (folder / "new").write_text(" ".join(str(pod.port) for pod in pods))
    (folder / "new").rename(folder / "ports")
    await asyncio.sleep(600)

asyncio.run(main())
"""

Start = Callable[..., Any]
Until = Callable[[Callable[[], object]], Any]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="prctl(2) and /proc are Linux's")


def family(folder: Path) -> list[int]:
    """The helpers of all replicas that ran."""
    return [int(file.read_text() or 0) for file in [*folder.glob("*.child"), *folder.glob("*.orphan")]]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_nothing_outlives_the_platform(number: signal.Signals, tmp_path: Path, is_gone: Callable[[int], bool]) -> None:
    argv = [sys.executable, "-c", PLATFORM, str(tmp_path), FAMILY]
    with (tmp_path / "printed").open("w") as output:
        platform = subprocess.Popen(argv, stdout=output, stderr=output, cwd=ROOT)
    try:
        while not (tmp_path / "ports").exists() and platform.poll() is None:
            time.sleep(0.01)
        assert platform.poll() is None, (tmp_path / "printed").read_text()
        ports = [int(port) for port in (tmp_path / "ports").read_text().split()]
        below = [process.pid for process in psutil.Process(platform.pid).children(recursive=True)]
        assert set(family(tmp_path)) < set(below)
        assert len(below) == 2 + 2 * 3  # agents, replicas and their helpers
        platform.send_signal(number)
        platform.wait(WAIT_S)
    finally:
        platform.kill()
        platform.wait()
    while not all(map(is_gone, below)):
        time.sleep(0.01)
    for port in ports:
        with socket.socket() as client:
            assert client.connect_ex(("127.0.0.1", port)) != 0


async def test_a_replica_that_crashes_takes_its_helpers_along(
    start: Start, until: Until, tmp_path: Path, is_gone: Callable[[int], bool]
) -> None:
    pod = (await start()).pod(FAMILY, str(tmp_path))
    await until(lambda: len(family(tmp_path)) == 2 and all(family(tmp_path)) and pod.phase == "ready")
    helpers = family(tmp_path)
    os.kill(pod.pid, signal.SIGKILL)
    await until(lambda: pod.restarts == 1)
    assert all(map(is_gone, helpers))  # so that the port is free for the next run
    await until(lambda: pod.phase == "ready")


async def test_a_replica_that_is_terminated_takes_its_helpers_along(
    start: Start, until: Until, tmp_path: Path, is_gone: Callable[[int], bool]
) -> None:
    pod = (await start()).pod(FAMILY, str(tmp_path))
    await until(lambda: len(family(tmp_path)) == 2 and all(family(tmp_path)))
    await pod.terminate()
    assert all(map(is_gone, family(tmp_path)))


async def test_an_agent_that_is_killed_takes_all_along_and_is_replaced(
    start: Start, until: Until, tmp_path: Path, own_children: Callable[[], list[int]]
) -> None:
    run = await start()
    pod = run.pod(FAMILY, str(tmp_path))
    await until(lambda: len(family(tmp_path)) == 2 and all(family(tmp_path)) and pod.phase == "ready")
    bystander = await asyncio.create_subprocess_exec(sys.executable, "-S", "-c", "import time; time.sleep(600)")
    try:
        ended = [pod.pid, *family(tmp_path)]
        (agent,) = [pid for pid in own_children() if pid != bystander.pid]
        os.kill(agent, signal.SIGKILL)
        await until(lambda: pod.restarts == 1)
        assert not any(map(psutil.pid_exists, [agent, *ended]))  # nor are they left as zombies
        await until(lambda: pod.phase == "ready")
        assert bystander.returncode is None
    finally:
        bystander.kill()
    assert await bystander.wait() == -signal.SIGKILL


async def test_a_start_on_a_dying_agent_is_repeated_on_a_new_one(
    start: Start, until: Until, own_children: Callable[[], list[int]]
) -> None:
    run = await start()
    first = run.pod(name="first")
    await until(lambda: first.phase == "ready")
    (agent,) = own_children()
    os.kill(agent, signal.SIGSTOP)  # takes requests, does nothing
    second = run.pod(name="second")
    await asyncio.sleep(0.05)
    os.kill(agent, signal.SIGKILL)
    await until(lambda: first.phase == second.phase == "ready")
    assert (first.restarts, second.restarts) == (1, 1)


async def test_closing_ends_pods_and_agents(start: Start, until: Until, own_children: Callable[[], list[int]]) -> None:
    run = await start()
    pods = [run.pod(name=f"p{index}") for index in range(3)]
    await until(lambda: all(pod.phase == "ready" for pod in pods))
    await run.kubelet.close()
    assert [pod.phase for pod in pods] == ["gone"] * 3
    assert own_children() == []
