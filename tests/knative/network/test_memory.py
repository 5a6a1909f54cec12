"""Large bodies pass through the whole path in one process without ever being held by it."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web

Start = Callable[..., Awaitable[Any]]

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from Linux' /proc"),
]

_BODY_BYTES = 64 << 20
_PIECE = bytes(1 << 20)
_HELD_KB_MAX = 24 << 10  # generous: buffers of sockets and of the allocator

_PLATFORM = """
import asyncio, sys
import uvloop
from knative.network.activator import Activator
from knative.network.forward import relay_session
from knative.network.ingress import Ingress, Route
from knative.network.queue_proxy import QueueProxy
from knative.network.timeouts import Timeouts

class Entry:
    def __init__(self, activator):
        self.activator = activator
    async def serve(self, request):
        return await self.activator.handle(request)

async def main():
    async with relay_session() as session:
        proxy = QueueProxy(revision="r", pod="p", target_port=int(sys.argv[1]), container_concurrency=1,
                           timeouts=Timeouts(), session=session, ready=lambda: True)
        await proxy.start()
        activator = Activator(revision="r", container_concurrency=1, timeouts=Timeouts(), on_stat=lambda seen: None)
        activator.set_backends([proxy])
        ingress = Ingress()
        await ingress.start()
        ingress.set_routes({"demo.default": Route(((100, Entry(activator)),))})
        print(ingress.address, flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        await ingress.close()
        await proxy.close()

uvloop.run(main())
"""


async def process(request: web.BaseRequest) -> web.StreamResponse:
    """Takes a body slowly at first, or sends one."""
    if request.method == "POST":
        await asyncio.sleep(0.3)  # whoever reads ahead has to keep it meanwhile
        taken = 0
        while piece := await request.content.readany():
            taken += len(piece)
        return web.Response(text=str(taken))
    response = web.StreamResponse()
    if request.raw_path.endswith("sized"):
        response.content_length = _BODY_BYTES
    await response.prepare(request)
    for _ in range(_BODY_BYTES // len(_PIECE)):
        await response.write(_PIECE)
    return response


@pytest.fixture
async def platform(upstream: Start, root: Path) -> AsyncIterator[tuple[str, Callable[[], int]]]:
    """URL of an ingress in a process of its own, and that process's peak of memory in KB."""
    port = await upstream(process)
    running = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        _PLATFORM,
        str(port),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        cwd=root,
    )
    assert running.stdin is not None
    assert running.stdout is not None
    address = (await running.stdout.readline()).decode().strip()
    assert address

    def peak_kb() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{running.pid}/status").read_text())
        assert found is not None
        return int(found[1])

    yield f"http://{address}/default/demo", peak_kb
    running.stdin.close()
    assert await asyncio.wait_for(running.wait(), 20) == 0


async def pieces() -> AsyncIterator[bytes]:
    for _ in range(_BODY_BYTES // len(_PIECE)):
        yield _PIECE


@pytest.mark.parametrize("headers", [{}, {"Content-Length": str(_BODY_BYTES)}], ids=["chunked", "sized"])
async def test_64_mib_pass_to_a_slow_process(
    headers: dict[str, str], platform: tuple[str, Callable[[], int]], client: aiohttp.ClientSession
) -> None:
    url, peak_kb = platform
    before_kb = peak_kb()
    async with client.post(url, data=pieces(), headers=headers) as answer:
        assert await answer.text() == str(_BODY_BYTES)
    assert peak_kb() - before_kb < _HELD_KB_MAX


@pytest.mark.parametrize("path", ["/chunked", "/sized"])
async def test_64_mib_pass_to_a_slow_client(
    path: str, platform: tuple[str, Callable[[], int]], client: aiohttp.ClientSession
) -> None:
    url, peak_kb = platform
    before_kb, taken = peak_kb(), 0
    async with client.get(url + path) as answer:
        await asyncio.sleep(0.3)
        async for piece in answer.content.iter_any():
            taken += len(piece)
    assert taken == _BODY_BYTES
    assert peak_kb() - before_kb < _HELD_KB_MAX
