"""A uvicorn server in the running event loop, for doors that need sockets."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from tools.fuzzing.asgi import App


class Served:
    """It leaves the signals of the process alone. `options` are those of uvicorn.Config."""

    def __init__(self, app: App, listener: socket.socket, **options: Any) -> None:
        config = uvicorn.Config(app, lifespan="off", log_config=None, access_log=False, loop="none", **options)
        self._server = _Server(config)
        self._task = asyncio.create_task(self._server.serve(sockets=[listener]))

    async def started(self) -> None:
        while not self._server.started:  # noqa: ASYNC110 (uvicorn has no event for it)
            await asyncio.sleep(0.01)

    async def stop(self) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        await self._task


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def listening() -> socket.socket:
    """On 127.0.0.1. asyncio sets TCP_NODELAY where the protocol is named; without it an answer may wait 40 ms for an
    acknowledgement."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


async def serve(app: App, listener: socket.socket, **options: Any) -> Served:
    served = Served(app, listener, **options)
    await served.started()
    return served
