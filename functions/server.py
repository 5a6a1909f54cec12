"""Serves the stage function in this process, by uvicorn, until SIGTERM and until its sequences have left.

The same as `functions-framework --asgi`, with four additions: a listening socket may be inherited (no race for a free
port), no second process is started (it would import torch again), a checkpoint that cannot be loaded ends the process
with exit code 1 and the reason as the last line, and events take a shorter way to the function's handler.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import tempfile
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
import uvloop
from functions_framework.aio import create_asgi_app
from starlette.types import ASGIApp, Receive, Scope, Send

from functions.contract.http_limits import limited_protocol
from functions.contract.logs import configure_logs
from functions.contract.settings_error import SettingsError

_LOOK_EVERY_S = 0.1
_SOURCE = Path(__file__).parent / "main.py"


def serve(fd: int | None = None) -> int:
    """Serves on the inherited socket `fd`, else on HOST and PORT. Returns the exit code."""
    configure_logs(as_json=not sys.stderr.isatty())
    try:
        _check_temporary_folder()
        framework_app = create_asgi_app("stage", str(_SOURCE), "http")
        host, port = os.environ.get("HOST", "0.0.0.0"), _port()
    except SettingsError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # a stage is asked by few clients over few connections that it should never be the first to close
    config = uvicorn.Config(
        _EventsFirst(_main().handler, framework_app),
        host=host,
        port=port,
        http=limited_protocol(_main().settings.http_limits),
        log_level="warning",
        access_log=False,
        timeout_keep_alive=3600,
    )
    # given as a socket: from a number uvicorn makes a Unix one, and replies then wait for delayed acknowledgements
    inherited = None if fd is None else [socket.socket(fileno=fd)]
    server = _Server(config)
    for number in (signal.SIGTERM, signal.SIGINT):
        # already now, and once more at the end: uvicorn raises what it got again, for whoever listened before it
        signal.signal(number, server.handle_exit)
    _service().start()
    return uvloop.run(_serve(server, inherited))  # a 16 MB hop takes half as long as under asyncio's loop


class _EventsFirst:
    """An ASGI app that has the function's handler answer events, and gives all else to `app`, the framework's.

    That would bring events to the same handler, through its middleware and a router: 0.06 ms more on a hop of 10 KB
    that takes 0.28 ms (2026-11-28, 2 CPU cores)."""

    def __init__(self, handler: Any, app: ASGIApp) -> None:
        self._handler = handler
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["method"] == "POST":
            answer = await self._handler.event(scope, receive)
            await answer(scope, receive, send)
        else:
            await self._app(scope, receive, send)


class _Server(uvicorn.Server):
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets sequences leave before the server closes its connections; a second one does not."""
        again = _service().leaving
        _service().stop()
        if again or _service().left:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: whether to stop serving."""
        return (_service().leaving and _service().left) or await super().on_tick(counter)


async def _serve(server: uvicorn.Server, inherited: list[socket.socket] | None) -> int:
    watch = asyncio.create_task(_stop_on_failure(server))
    await server.serve(sockets=inherited)
    watch.cancel()
    failure = _service().failure
    if failure is not None:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failure is not None else 0


async def _stop_on_failure(server: uvicorn.Server) -> None:
    while _service().failure is None:
        await asyncio.sleep(_LOOK_EVERY_S)
        if _service().ready:
            return
    server.should_exit = True


def _service() -> Any:
    return _main().service


def _main() -> Any:
    return sys.modules["main"]  # Functions Framework files the source under its stem


def _check_temporary_folder() -> None:
    """torch makes a folder for its caches while it is imported, and ends with a trace where it cannot."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        raise SettingsError(
            f"{error.strerror}; a stage needs one: mount an emptyDir at /tmp, or name another folder with TMPDIR"
        ) from None


def _port() -> int:
    text = os.environ.get("PORT", "8080")
    if not text.isdecimal() or int(text) > 65535:
        raise SettingsError(f"PORT must be a port number, got {text!r}")
    return int(text)
