"""Child processes, real ones: they leave with their parent, however it goes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks import processes, tether
from benchmarks.processes import Child

ROOT = Path(__file__).resolve().parents[2]
SLEEP = "import time; time.sleep(600)"
STUBBORN = f"import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); {SLEEP}"
PARENT = """
import asyncio, os, sys
from pathlib import Path
from benchmarks.processes import Child

async def main():
    argv = [sys.executable, "-c", "import time; time.sleep(600)"]
    children = [await Child.start(f"c{i}", argv, env=os.environ, log=Path(sys.argv[1]) / f"{i}") for i in range(2)]
    print(*(child.pid for child in children), flush=True)
    await asyncio.sleep(600)

asyncio.run(main())
"""


async def start(code: str, log: Path) -> Child:
    return await Child.start("child", [sys.executable, "-c", code], env=os.environ, log=log)


async def until_printed(child: Child, text: str) -> None:
    while text not in child.last_lines():  # noqa: ASYNC110 (a file sets no event)
        await asyncio.sleep(0.01)


def is_gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


async def test_both_outputs_of_a_child_reach_its_log(tmp_path: Path) -> None:
    child = await start(
        "import sys; print('one', flush=True); print('two', file=sys.stderr); sys.exit(3)", tmp_path / "l"
    )
    assert await child.wait() == 3
    assert child.last_lines() == ["one", "two"]
    assert child.how_it_ended() == "ended with exit code 3"


async def test_only_the_last_lines_of_a_long_log_are_given(tmp_path: Path) -> None:
    child = await start("for i in range(100_000): print(i)", tmp_path / "l")
    await child.wait()
    assert child.last_lines(3) == ["99997", "99998", "99999"]


async def test_a_killed_child_names_the_signal(tmp_path: Path) -> None:
    child = await start(SLEEP, tmp_path / "l")
    child.send(signal.SIGKILL)
    await child.wait()
    assert "killed by SIGKILL" in child.how_it_ended()


async def test_stop_ends_children_that_heed_sigterm(tmp_path: Path) -> None:
    children = [await start(SLEEP, tmp_path / str(index)) for index in range(3)]
    await processes.stop(children, grace_s=60)
    assert [child.exit_code for child in children] == [-signal.SIGTERM] * 3


async def test_stop_kills_a_child_that_ignores_sigterm(tmp_path: Path) -> None:
    child = await start(STUBBORN, tmp_path / "l")
    await until_printed(child, "deaf")
    await processes.stop([child], grace_s=0.1)
    assert child.exit_code == -signal.SIGKILL


async def test_a_cancelled_stop_kills_without_further_grace(tmp_path: Path) -> None:
    child = await start(STUBBORN, tmp_path / "l")
    await until_printed(child, "deaf")
    stopping = asyncio.create_task(processes.stop([child], grace_s=600))
    await asyncio.sleep(0.05)
    stopping.cancel()
    with pytest.raises(asyncio.CancelledError):
        await stopping
    assert await child.wait() == -signal.SIGKILL


async def test_stopping_ended_children_is_no_error(tmp_path: Path) -> None:
    child = await start("pass", tmp_path / "l")
    await child.wait()
    await processes.stop([child], grace_s=1)
    await processes.stop([], grace_s=1)
    assert child.exit_code == 0


async def test_a_program_that_does_not_exist_ends_with_its_name_in_the_log(tmp_path: Path) -> None:
    child = await Child.start("child", ["/no/such/program"], env=os.environ, log=tmp_path / "l")
    assert await child.wait() != 0
    assert "FileNotFoundError" in child.last_lines()[-1]


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's")
def test_children_die_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert parent.stdout is not None
    with parent.stdout:
        pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    parent.kill()
    parent.wait()
    while not all(map(is_gone, pids)):
        time.sleep(0.01)


def test_a_child_whose_parent_has_gone_before_it_starts_does_not_run() -> None:
    stranger = subprocess.Popen([sys.executable, "-c", SLEEP])
    argv = [sys.executable, tether.__file__, str(stranger.pid), sys.executable, "-c", "print('ran')"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    stranger.kill()
    stranger.wait()
    assert (done.returncode, done.stdout) == (1, "")
