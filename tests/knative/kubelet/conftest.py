"""A kubelet that ends with its test, and small programs for it to run."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from knative.images import Command
from knative.kubelet import lineage
from knative.kubelet.kubelet import Kubelet
from knative.kubelet.pod import Pod, PodSpec
from knative.resources.objects import Probe

WAIT_S = 30.0  # against hangs


@pytest.fixture
def own_children() -> Callable[[], list[int]]:
    """The children of this process that have come since the test began: other tests may have left some running."""
    before = set(lineage.children_of(os.getpid()))
    return lambda: [pid for pid in lineage.children_of(os.getpid()) if pid not in before]


# answers with the status in the file STATUS (200 if there is none) and prints the requests
SERVER = """
import os, pathlib, socket
listener = socket.create_server(("127.0.0.1", int(os.environ["PORT"])))
print("listening", flush=True)
while True:
    peer, _ = listener.accept()
    with peer:
        request = peer.recv(65536).decode()
        if not request:
            continue
        print(request, flush=True)
        status = pathlib.Path(os.environ.get("STATUS", "/nowhere"))
        code, _, location = (status.read_text() if status.exists() else "200").partition(" ")
        headers = f"Location: {location}\\r\\n" if location else ""
        body = "said by the server"
        peer.sendall(f"HTTP/1.1 {code} X\\r\\n{headers}Content-Length: {len(body)}\\r\\n\\r\\n{body}".encode())
"""


class Run:
    """A kubelet and what it reported."""

    def __init__(self, folder: Path, **options: Any) -> None:
        self.phases: list[str] = []
        self.kubelet = Kubelet(folder, on_change=self._changed, **{"gpus": (), "backoff_s": 0.05, **options})

    def _changed(self, pod: Pod) -> None:
        self.phases.append(pod.phase)

    def pod(self, code: str = SERVER, *args: str, command: Command | None = None, **spec: Any) -> Pod:
        """Runs `code`, else `command`."""
        program = (sys.executable, "-S", "-c", code, *args)
        values: dict[str, Any] = {"name": "pod", "env": {}, "readiness": Probe("tcp"), "liveness": None}
        values |= {"startup": None, "grace_s": WAIT_S, "command": command or Command(argv=program), **spec}
        return self.kubelet.run(PodSpec(**values), self.kubelet.port())


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 (other processes set no events)
            await asyncio.sleep(0.005)


@pytest.fixture
def until() -> Callable[[Callable[[], object]], Any]:
    """Waits for a condition."""
    return _until


@pytest.fixture
async def start(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """Starts a kubelet with these options; ends its pods at once when the test is over."""
    runs: list[Run] = []

    async def start_kubelet(**options: Any) -> Run:
        run = Run(tmp_path / f"kubelet{len(runs)}", **options)
        runs.append(run)
        await run.kubelet.start()
        return run

    yield start_kubelet
    async with asyncio.timeout(WAIT_S):
        await asyncio.gather(*(run.kubelet.close(now=True) for run in runs))


@pytest.fixture
def is_gone() -> Callable[[int], bool]:
    def gone(pid: int) -> bool:
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    return gone
