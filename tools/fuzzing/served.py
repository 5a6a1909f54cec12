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


async def serve(app: App, listener: socket.socket, **options: Any) -> Served:
    served = Served(app, listener, **options)
    await served.started()
    return served
