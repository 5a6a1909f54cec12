"""What has ended pods for good once: a real-time signal, and a log folder that cannot be used for a moment."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

Start = Callable[..., Any]
Until = Callable[[Callable[[], object]], Any]


async def test_a_pod_that_a_real_time_signal_ended_is_restarted(start: Start, until: Until) -> None:
    pod = (await start()).pod()
    await until(lambda: pod.phase == "ready")
    os.kill(pod.pid, signal.SIGRTMIN + 6)  # has no name of its own
    await until(lambda: pod.phase == "gone" or (pod.restarts and pod.phase == "ready"))
    assert (pod.phase, pod.restarts) == ("ready", 1)


async def test_a_pod_whose_log_folder_cannot_be_used_is_started_when_it_can(
    start: Start, until: Until, tmp_path: Path
) -> None:
    run = await start()
    pod = run.pod()
    await until(lambda: pod.phase == "ready")
    folder = tmp_path / "kubelet0" / "logs"
    shutil.rmtree(folder)
    folder.write_text("no folder any more")
    pod.kill(signal.SIGKILL)
    await until(lambda: pod.phase in ("backoff", "gone"))
    assert "could not be started: [Errno 20] Not a directory" in pod.message
    folder.unlink()
    await until(lambda: pod.phase == "ready")
