"""The compute thread: one thing at a time, in order, with its results and errors."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from functions.compute_thread import ComputeThread


async def test_work_is_done_in_order_on_one_thread() -> None:
    compute, order = ComputeThread("compute"), []

    def work(number: int) -> tuple[int, str]:
        order.append(number)
        return number, threading.current_thread().name

    assert await asyncio.gather(*(compute.run(work, i) for i in range(20))) == [(i, "compute") for i in range(20)]
    assert order == list(range(20))


async def test_an_error_reaches_who_asked_and_the_next_work_is_done() -> None:
    compute = ComputeThread("compute")
    with pytest.raises(ZeroDivisionError):
        await compute.run(lambda: 1 // 0)
    assert await compute.run(sum, [1, 2]) == 3


async def test_work_that_nobody_waits_for_is_left_out_unless_it_has_begun() -> None:
    compute, begun, go_on, done = ComputeThread("compute"), threading.Event(), threading.Event(), []

    def first() -> None:
        begun.set()
        go_on.wait(30)
        done.append("first")

    tasks = [asyncio.create_task(compute.run(work)) for work in (first, lambda: done.append("second"))]
    await asyncio.to_thread(begun.wait, 30)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    go_on.set()
    assert await compute.run(lambda: list(done)) == ["first"]


def test_the_interpreter_ends_when_the_work_has_ended(root: Path) -> None:
    """Its loop may be gone by then."""
    code = (
        "import asyncio, time\n"
        "from functions.compute_thread import ComputeThread\n"
        "def work():\n    time.sleep(0.3)\n    print('done', flush=True)\n"
        "async def main():\n    asyncio.create_task(ComputeThread('compute').run(work))\n"
        "    await asyncio.sleep(0.05)\n"
        "asyncio.run(main())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
