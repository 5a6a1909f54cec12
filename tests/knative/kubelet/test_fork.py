"""Python modules as forks of an agent that has imported what they need."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from structlog.testing import capture_logs

from knative.images import Command
from knative.resources.objects import Probe

COSTLY = """
import os, pathlib, random
with open({seen!r}, "a") as file:
    print(os.getpid(), file=file)
"""
TELL = """
import ctypes, json, os, pathlib, random, signal, sys, threading
libc = ctypes.CDLL(None)
libc.getenv.restype = ctypes.c_char_p
libc.getenv.argtypes = [ctypes.c_char_p]
print(json.dumps({
    "name": __name__, "argv": sys.argv, "env": dict(os.environ), "c": libc.getenv(b"ONLY_HERE").decode(),
    "c_unset": libc.getenv(b"PLATFORM_ONLY_LATER") is None,
    "folder": os.getcwd(), "session": os.getsid(0) == os.getpid(), "random": random.random(), "path": sys.path,
    "fds": sorted(int(fd) for fd in os.listdir("/proc/self/fd"))[:-1], "stdin": os.readlink("/proc/self/fd/0"),
    "handlers": [int(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGCHLD, signal.SIGUSR1)],
    "sigint": signal.getsignal(signal.SIGINT) is signal.default_int_handler,
    "blocked": len(signal.pthread_sigmask(signal.SIG_BLOCK, ())), "preloaded": "costly" in sys.modules,
}), flush=True)
signal.pause()
"""
SERVE = """
import os, signal, socket
import costly
listener = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
signal.pause()
"""

Start = Callable[..., Any]
Until = Callable[[Callable[[], object]], Any]


@pytest.fixture
def modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that Python imports from, in agents and replicas too; `costly` writes its pid when it is imported."""
    folder = tmp_path / "modules"
    folder.mkdir()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    (folder / "costly.py").write_text(COSTLY.format(seen=str(tmp_path / "imported")))
    (folder / "tell.py").write_text(TELL)
    (folder / "serve.py").write_text(SERVE)
    return folder


def printed(pod: Any) -> str:
    return pod.logs()[-1].read_text() if pod.logs() else ""


async def ended(run: Any, until: Until, code: str, modules: Path) -> tuple[str, str]:
    """The message and the log of a pod that runs the module `code` once."""
    (modules / "once.py").write_text(code)
    pod = run.pod(command=Command(module="once", preload=("costly",)))
    await until(lambda: pod.restarts == 1)
    message = pod.message
    log = pod.logs()[0].read_text()
    await pod.terminate(0.0)
    return message, log


@pytest.mark.parametrize("fork", [True, False])
async def test_a_module_sees_what_is_its_own(
    fork: bool, start: Start, until: Until, modules: Path, tmp_path: Path
) -> None:
    run = await start(fork=fork)
    command = Command(module="tell", args=("--x", "1"), preload=("costly",))
    env = {"ONLY_HERE": "é", "PYTHONPATH": f"{tmp_path}{os.pathsep}{modules}"}
    pod = run.pod(command=command, env=env, working_dir=str(tmp_path))
    await until(lambda: "\n" in printed(pod))
    seen = json.loads(printed(pod))
    assert (seen["name"], seen["argv"]) == ("__main__", [str(modules / "tell.py"), "--x", "1"])
    assert env.items() - {("PYTHONPATH", env["PYTHONPATH"])} <= seen["env"].items()
    assert seen["env"]["PORT"] == str(pod.port)
    assert seen["c"] == "é"
    assert seen["folder"] == str(tmp_path)
    assert seen["session"]
    assert seen["stdin"] == os.devnull
    assert seen["fds"] == [0, 1, 2]
    assert seen["handlers"] == [signal.SIG_DFL] * 3
    assert (seen["sigint"], seen["blocked"]) == (True, 0)
    assert str(tmp_path) in seen["path"]
    assert "" not in seen["path"]
    assert seen["preloaded"] == fork


async def test_a_variable_that_the_platform_loses_is_gone_in_a_fork(
    start: Start, until: Until, modules: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PLATFORM_ONLY_LATER", "x")
    run = await start()
    await run.kubelet.warm(("costly",))
    monkeypatch.delenv("PLATFORM_ONLY_LATER")
    pod = run.pod(command=Command(module="tell", preload=("costly",)), env={"ONLY_HERE": "1"})
    await until(lambda: "\n" in printed(pod))
    seen = json.loads(printed(pod))
    assert seen["c_unset"]
    assert "PLATFORM_ONLY_LATER" not in seen["env"]


@pytest.mark.parametrize(("fork", "imports"), [(True, 1), (False, 3)])
async def test_replicas_share_one_import_of_the_preload(
    fork: bool, imports: int, start: Start, until: Until, modules: Path, tmp_path: Path
) -> None:
    run = await start(fork=fork)
    pods = [run.pod(name=f"p{i}", command=Command(module="serve", preload=("costly",))) for i in range(3)]
    await until(lambda: all(pod.phase == "ready" for pod in pods))
    importers = (tmp_path / "imported").read_text().split()
    assert len(importers) == imports
    assert len({pod.pid for pod in pods}) == 3
    assert (str(pods[0].pid) in importers) != fork


async def test_forks_do_not_share_random_numbers(start: Start, until: Until, modules: Path) -> None:
    (modules / "draw.py").write_text(
        "import random, numpy, signal\nprint(random.random(), numpy.random.random(), flush=True)\nsignal.pause()"
    )
    run = await start()
    preload = ("random", "numpy.random")
    pods = [run.pod(name=f"p{i}", command=Command(module="draw", preload=preload)) for i in range(2)]
    await until(lambda: all("\n" in printed(pod) for pod in pods))
    (a, b), (c, d) = (printed(pod).split() for pod in pods)
    assert len({a, b, c, d}) == 4


async def test_a_fork_of_torch_heeds_its_own_threads_and_draws_its_own_numbers(
    start: Start, until: Until, modules: Path
) -> None:
    code = "import torch, signal\nprint(torch.get_num_threads(), torch.rand(1).item(), flush=True)\nsignal.pause()"
    (modules / "draw.py").write_text(code)
    run = await start()
    command = Command(module="draw", preload=("torch",))
    pods = [run.pod(name=f"p{count}", command=command, cpus=count) for count in (1, 3)]
    await until(lambda: all("\n" in printed(pod) for pod in pods))
    (one, a), (three, b) = (printed(pod).split() for pod in pods)
    assert (one, three) == ("1", "3")
    assert a != b


@pytest.mark.parametrize(
    ("code", "message", "log"),
    [
        ("pass", "exit code 0", ""),
        ("import sys; sys.exit(3)", "exit code 3", ""),
        ("import sys; sys.exit('bad model')", "exit code 1, last printed: bad model", "bad model\n"),
        ("import os; os._exit(9)", "exit code 9", ""),
        ("import os; os.abort()", "killed by SIGABRT", ""),
        ("print('unflushed', end='')", "exit code 0, last printed: unflushed", "unflushed"),
        ("import atexit; atexit.register(print, 'bye')", "exit code 0", "bye\n"),
        (
            "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.1), print('slow'))).start()",
            "exit code 0",
            "slow\n",
        ),
    ],
)
async def test_a_forked_module_ends_as_an_interpreter_would(
    code: str, message: str, log: str, start: Start, until: Until, modules: Path
) -> None:
    said, wrote = await ended(await start(), until, code, modules)
    assert message in said
    assert wrote == log


async def test_the_traceback_of_a_forked_module_begins_in_the_module(start: Start, until: Until, modules: Path) -> None:
    said, wrote = await ended(await start(), until, "def f(): raise ValueError('odd')\nf()", modules)
    assert "exit code 1, last printed: ValueError: odd" in said
    assert wrote.startswith("Traceback (most recent call last):\n")
    assert "agent.py" not in wrote
    assert "runpy" not in wrote
    assert "in f" in wrote


async def test_a_forked_module_ends_by_sigterm(start: Start, until: Until, modules: Path) -> None:
    pod = (await start(backoff_s=600)).pod(command=Command(module="serve", preload=("costly",)))
    await until(lambda: pod.phase == "ready")
    pod.kill(signal.SIGTERM)
    await until(lambda: pod.restarts == 1)
    assert "killed by SIGTERM" in pod._last_end


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("raise RuntimeError('no GPU driver')", "broken: RuntimeError: no GPU driver"),
        ("import no_such_thing", "broken: ModuleNotFoundError"),
        ("import threading, time\nthreading.Thread(target=time.sleep, args=(600,), daemon=True).start()", "threads"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by SIGKILL"),
    ],
)
async def test_modules_that_cannot_be_shared_are_imported_by_each_replica(
    code: str, reason: str, start: Start, until: Until, modules: Path, tmp_path: Path
) -> None:
    (modules / "broken.py").write_text(code)
    run = await start()
    with capture_logs() as events:
        pod = run.pod(command=Command(module="serve", preload=("broken",)))
        await until(lambda: pod.phase == "ready")
    (warning,) = [event for event in events if event["event"] == "preload_failed"]
    assert reason in warning["error"]
    assert str(pod.pid) in (tmp_path / "imported").read_text().split()


async def test_warming_ahead_leaves_nothing_to_import(
    start: Start, until: Until, modules: Path, tmp_path: Path
) -> None:
    run = await start()
    await run.kubelet.warm(("costly",))
    importer = (tmp_path / "imported").read_text()
    pod = run.pod(command=Command(module="serve", preload=("costly",)))
    await until(lambda: pod.phase == "ready")
    assert (tmp_path / "imported").read_text() == importer


async def test_a_pod_can_end_while_its_preload_is_imported(start: Start, until: Until, modules: Path) -> None:
    (modules / "slow.py").write_text("import time; time.sleep(600)")
    pod = (await start()).pod(command=Command(module="serve", preload=("slow",)), readiness=Probe("tcp"))
    await until(lambda: pod.phase == "starting")
    await pod.terminate()
    assert pod.phase == "gone"


async def test_a_module_without_preload_runs_in_an_interpreter_of_its_own(
    start: Start, until: Until, modules: Path
) -> None:
    pod = (await start()).pod(command=Command(module="tell"), env={"ONLY_HERE": "1"})
    await until(lambda: "\n" in printed(pod))
    assert psutil.Process(pod.pid).cmdline() == [sys.executable, "-P", "-m", "tell"]
