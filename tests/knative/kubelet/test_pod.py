"""A pod's life, with real processes: started, probed, restarted, ended."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from knative.images import Command
from knative.kubelet import lineage
from knative.resources.objects import Probe

DEAF = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
CRASH = "print('first line'); raise SystemExit('no such model: llama')"
TELL = """
import json, os, sys
print(json.dumps({
    "argv": sys.argv, "env": dict(os.environ), "folder": os.getcwd(), "session": os.getsid(0) == os.getpid(),
    "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1], "stdin": os.readlink("/proc/self/fd/0"),
}), flush=True)
import time; time.sleep(600)
"""

Start = Callable[..., Any]
Until = Callable[[Callable[[], object]], Any]


def printed(pod: Any) -> str:
    return pod.logs()[-1].read_text() if pod.logs() else ""


async def test_a_server_gets_ready_by_http(start: Start, until: Until) -> None:
    run = await start()
    pod = run.pod(readiness=Probe("http", path="/healthz?x=1", headers=(("X-Token", "t"),)))
    assert (pod.phase, pod.pid) == ("pending", None)
    await until(lambda: pod.phase == "ready")
    assert run.phases == ["starting", "ready"]
    assert pod.message == ""
    assert 0 < pod.started_s <= pod.ready_s
    assert "GET /healthz?x=1 HTTP/1.1" in printed(pod)
    assert "User-Agent: kube-probe/" in printed(pod)
    assert "X-Token: t" in printed(pod)


async def test_a_server_that_answers_503_is_not_ready_until_it_answers_200(
    start: Start, until: Until, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    status.write_text("503")
    pod = (await start()).pod(readiness=Probe("http"), env={"STATUS": str(status)})
    await until(lambda: "HTTP 503 (said by the server)" in pod.message)
    assert pod.phase == "starting"
    status.write_text("200")
    await until(lambda: pod.phase == "ready")


@pytest.mark.parametrize(
    ("status", "ready"),
    [("302 https://example.com/login", True), ("302 /elsewhere", False), ("399", True), ("404", False)],
)
async def test_redirects_are_followed_only_on_the_same_address(
    status: str, ready: bool, start: Start, until: Until, tmp_path: Path
) -> None:
    (tmp_path / "status").write_text(status)
    pod = (await start()).pod(readiness=Probe("http"), env={"STATUS": str(tmp_path / "status")})
    await until(lambda: pod.phase == "ready" or "HTTP 404" in pod.message or "10 redirects" in pod.message)
    assert (pod.phase == "ready") == ready


async def test_a_server_gets_ready_by_tcp_however_late_it_listens(start: Start, until: Until, tmp_path: Path) -> None:
    late = f"import pathlib, time\nwhile not pathlib.Path({str(tmp_path / 'go')!r}).exists(): time.sleep(0.01)\n"
    run = await start()
    pod = run.pod(
        late + "import os, socket, time\ns = socket.create_server(('', int(os.environ['PORT'])))\ntime.sleep(600)"
    )
    await until(lambda: "connection refused" in pod.message)
    await asyncio.sleep(0.2)  # some tries more
    assert pod.phase == "starting"
    (tmp_path / "go").touch()
    await until(lambda: pod.phase == "ready")


async def test_a_pod_gets_ready_by_a_command_in_its_environment(start: Start, until: Until, tmp_path: Path) -> None:
    command = ("sh", "-c", 'test -e "$FLAG" || { echo "no flag on $PORT"; exit 7; }')
    pod = (await start()).pod(readiness=Probe("exec", command=command), env={"FLAG": str(tmp_path / "flag")})
    await until(lambda: f"exit code 7, no flag on {pod.port}" in pod.message)
    (tmp_path / "flag").touch()
    await until(lambda: pod.phase == "ready")


async def test_a_probe_command_that_hangs_is_killed_with_what_it_started(
    start: Start, until: Until, is_gone: Callable[[int], bool], tmp_path: Path
) -> None:
    command = ("sh", "-c", f"setsid sleep 600 & echo $! > {tmp_path}/pid; sleep 600")
    pod = (await start()).pod(readiness=Probe("exec", command=command, timeout_s=1, period_s=600))
    await until(lambda: "no answer within 1 s" in pod.message)
    await until(lambda: is_gone(int((tmp_path / "pid").read_text())))


async def test_a_ready_pod_that_fails_its_probe_is_unready_until_it_recovers(
    start: Start, until: Until, tmp_path: Path
) -> None:
    status = tmp_path / "status"
    run = await start()
    pod = run.pod(readiness=Probe("http", period_s=1, failure_threshold=1), env={"STATUS": str(status)})
    await until(lambda: pod.phase == "ready")
    status.write_text("500")
    await until(lambda: pod.phase == "unready")
    assert "HTTP 500" in pod.message
    status.unlink()
    await until(lambda: pod.phase == "ready")
    assert pod.restarts == 0


async def test_a_failed_liveness_probe_restarts_the_process(start: Start, until: Until, tmp_path: Path) -> None:
    status = tmp_path / "status"
    pod = (await start()).pod(
        liveness=Probe("http", initial_delay_s=1, period_s=1, failure_threshold=1), env={"STATUS": str(status)}
    )
    await until(lambda: pod.phase == "ready")
    first, port = pod.pid, pod.port
    status.write_text("500")
    await until(lambda: pod.restarts == 1)
    assert "liveness probe failed" in pod.message
    assert "HTTP 500" in pod.message
    status.unlink()
    await until(lambda: pod.phase == "ready")
    assert pod.pid != first
    assert pod.port == port


async def test_the_startup_probe_holds_back_the_others(start: Start, until: Until, tmp_path: Path) -> None:
    flag = tmp_path / "flag"
    pod = (await start()).pod(startup=Probe("exec", command=("test", "-e", str(flag)), period_s=1))
    await until(lambda: "listening" in printed(pod))
    await asyncio.sleep(0.2)  # time for a readiness probe, were there any
    assert pod.phase == "starting"
    flag.touch()
    await until(lambda: pod.phase == "ready")


async def test_a_startup_probe_that_never_succeeds_restarts_the_process(start: Start, until: Until) -> None:
    pod = (await start()).pod(startup=Probe("exec", command=("false",), period_s=1, failure_threshold=1))
    await until(lambda: pod.restarts == 1)
    assert "startup probe failed: command false: exit code 1" in pod.message


async def test_sigterm_lets_the_process_finish_its_work(start: Start, until: Until, tmp_path: Path) -> None:
    code = f"""
import signal, sys, time, pathlib
def finish(*_):
    time.sleep(0.2)
    pathlib.Path({str(tmp_path / "done")!r}).touch()
    sys.exit()
signal.signal(signal.SIGTERM, finish)
print("up", flush=True)
time.sleep(600)
"""
    run = await start()
    pod = run.pod(code)
    await until(lambda: "up" in printed(pod))
    await pod.terminate()
    assert (tmp_path / "done").exists()
    assert run.phases[-2:] == ["draining", "gone"]
    assert pod.pid is None


async def test_sigkill_follows_when_the_grace_is_over(
    start: Start, until: Until, is_gone: Callable[[int], bool]
) -> None:
    pod = (await start()).pod(DEAF, grace_s=0.1)
    await until(lambda: "deaf" in printed(pod))
    pid = pod.pid
    await pod.terminate()
    assert is_gone(pid)
    assert pod.phase == "gone"


async def test_a_second_terminate_can_cut_the_grace_short(start: Start, until: Until) -> None:
    pod = (await start()).pod(DEAF, grace_s=600)
    await until(lambda: "deaf" in printed(pod))
    first = asyncio.create_task(pod.terminate())
    await until(lambda: pod.phase == "draining")
    first.cancel()
    await pod.terminate(0.0)
    assert pod.phase == "gone"


async def test_a_pod_ends_even_if_nobody_waits_for_it(start: Start, until: Until) -> None:
    pod = (await start()).pod(DEAF)
    await until(lambda: "deaf" in printed(pod))
    waiting = asyncio.create_task(pod.terminate(0.1))
    await until(lambda: pod.phase == "draining")
    waiting.cancel()
    await until(lambda: pod.phase == "gone")


async def test_a_pod_can_end_before_its_process_has_started(start: Start) -> None:
    pod = (await start()).pod()
    await pod.terminate()
    assert pod.phase == "gone"


async def test_a_crash_at_start_backs_off_and_says_what_was_printed(start: Start, until: Until) -> None:
    run = await start(backoff_s=600)
    pod = run.pod(CRASH)
    await until(lambda: pod.phase == "backoff")
    assert pod.restarts == 1  # the first restart was at once
    assert run.phases == ["starting", "backoff"]
    assert "exit code 1, last printed: no such model: llama" in pod.message
    assert "back-off of 600 s until" in pod.message
    assert pod.pid is None
    await pod.terminate()
    assert run.phases[-1] == "gone"


async def test_a_program_that_crashes_at_first_gets_ready_in_the_end(
    start: Start, until: Until, tmp_path: Path
) -> None:
    code = f"""
import os, pathlib, socket, sys, time
tries = pathlib.Path({str(tmp_path / "tries")!r})
count = len(tries.read_text()) if tries.exists() else 0
tries.write_text("x" * (count + 1))
if count < 3: sys.exit(count)
listener = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
time.sleep(600)
"""
    run = await start()
    pod = run.pod(code)
    await until(lambda: pod.phase == "ready")
    assert pod.restarts == 3
    assert run.phases == ["starting", "backoff", "starting", "backoff", "starting", "ready"]
    assert [file.name for file in pod.logs()] == ["2.log", "3.log"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"command": Command(argv=("no-such-program", "x"))}, "'no-such-program': no such program"),
        ({"working_dir": "/no/such/folder"}, "No such file or directory: '/no/such/folder'"),
        ({"command": Command(module="no_such_module")}, "No module named no_such_module"),
    ],
)
async def test_a_command_that_cannot_run_says_why(
    options: dict[str, Any], message: str, start: Start, until: Until
) -> None:
    pod = (await start(backoff_s=600)).pod(**options)
    await until(lambda: pod.phase == "backoff")
    assert message in pod.message


async def test_a_port_taken_by_another_program_is_named(start: Start, until: Until) -> None:
    run = await start(backoff_s=600)
    pod = run.pod("import time; time.sleep(600)")
    await until(lambda: pod.pid)
    thief = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", pod.port)
    pod.kill(signal.SIGKILL)
    await until(lambda: pod.phase == "backoff")
    assert f"port {pod.port} is taken by another program" in pod.message
    thief.close()


async def test_the_process_sees_its_own_environment_folder_and_session(
    start: Start, until: Until, tmp_path: Path
) -> None:
    command = Command(argv=(sys.executable, "-S", "-c", TELL, "a", "b c"), env={"A": "command", "B": "command"})
    pod = (await start()).pod(
        command=command, env={"B": "pod", "K_SERVICE": "s", "ODD": "é\udc80"}, working_dir=str(tmp_path), cpus=1.5
    )
    await until(lambda: "\n" in printed(pod))
    seen = json.loads(printed(pod))
    wanted = {"A": "command", "B": "pod", "K_SERVICE": "s", "ODD": "é\udc80", "PORT": str(pod.port)}
    wanted |= {"OMP_NUM_THREADS": "2", "PYTHONUNBUFFERED": "1", "PATH": os.environ["PATH"]}
    assert wanted.items() <= seen["env"].items()
    assert seen["argv"] == ["-c", "a", "b c"]
    assert seen["folder"] == str(tmp_path)
    assert seen["session"]
    assert seen["stdin"] == os.devnull
    assert seen["fds"] == [0, 1, 2]


async def test_threads_asked_for_by_name_win_over_the_cpu_limit(start: Start, until: Until) -> None:
    pod = (await start()).pod(TELL, env={"OMP_NUM_THREADS": "7"}, cpus=2)
    await until(lambda: "\n" in printed(pod))
    assert json.loads(printed(pod))["env"]["OMP_NUM_THREADS"] == "7"


async def test_a_pod_waits_for_its_gpus(start: Start, until: Until) -> None:
    run = await start(gpus=("0", "1"))
    first, second, third = (run.pod(TELL, name=f"p{count}", gpus=count) for count in (1, 2, 3))
    await until(lambda: "\n" in printed(first))
    assert json.loads(printed(first))["env"]["CUDA_VISIBLE_DEVICES"] == "0"
    assert second.phase == "pending"
    assert second.message == "waiting for a GPU: 1/2 nvidia.com/gpu available, 2 asked for"
    await first.terminate()
    await until(lambda: "\n" in printed(second))
    assert set(json.loads(printed(second))["env"]["CUDA_VISIBLE_DEVICES"].split(",")) == {"0", "1"}
    assert third.phase == "pending"
    await third.terminate()
    assert third.phase == "gone"


async def test_gpus_are_found_as_the_driver_lists_them(
    start: Start, until: Until, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\nprintf '0\\n1\\n'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    pod = (await start(gpus=None)).pod(TELL, gpus=2)
    await until(lambda: "\n" in printed(pod))
    assert json.loads(printed(pod))["env"]["CUDA_VISIBLE_DEVICES"] == "0,1"


async def test_a_listener_of_changes_that_fails_does_no_harm(start: Start, until: Until) -> None:
    def fail(pod: object) -> None:
        raise ValueError("a mistake of the listener")

    run = await start()
    run.kubelet._on_change = fail
    pod = run.pod()
    await until(lambda: pod.phase == "ready")


async def test_two_pods_of_one_name_are_refused(start: Start) -> None:
    run = await start()
    run.pod()
    with pytest.raises(ValueError, match="a pod 'pod' already"):
        run.pod()


async def test_many_starts_and_stops_leave_nothing_behind(
    start: Start, until: Until, own_children: Callable[[], list[int]]
) -> None:
    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/fd")), len(own_children())

    async def cycle(name: str) -> None:
        pod = run.pod(name=name)
        await until(lambda: pod.phase == "ready")
        await pod.terminate()

    run = await start()
    await cycle("first")  # starts the agent
    agents = own_children()
    before = held()
    for batch in range(5):
        await asyncio.gather(*(cycle(f"{batch}-{index}") for index in range(10)))
    await until(lambda: held() == before)
    assert all(lineage.children_of(agent) == [] for agent in agents)
