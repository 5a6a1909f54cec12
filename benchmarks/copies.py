"""How many copies of a body are in memory at once, at either end of a hop.

Counted by tracemalloc, which sees what Python and NumPy allocate, in units of the body's size. The client end is the
StageClient asking a bare echo, the other the stage's own handler, fed as uvicorn feeds it: in chunks. What a stage's
blocks allocate is no copy of the body; a stand-in answers in their place.
"""

from __future__ import annotations

import gc
import tracemalloc
from types import SimpleNamespace
from typing import Any, cast

import numpy as np

from functions.contract import events
from functions.contract.events import Event
from orchestrator.stage_connection import ReplicaConnections

CHUNK_BYTES = 256 << 10  # what uvloop receives at once
TIMEOUT_S = 60.0


async def at_client(url: str, size: int) -> float:
    """The event and its reply, both of `size` bytes, where `url` echoes."""
    connections = ReplicaConnections()
    try:
        await connections.post(url, "", b"warm", TIMEOUT_S)
        with _Peak() as peak:
            body = bytes(size)
            reply = await connections.post(url, "", body, TIMEOUT_S)
        assert len(reply.body) == size
    finally:
        connections.close()
    return peak.bytes / size


async def at_stage(size: int) -> float:
    """The event and a reply of about `size` bytes each, where the computation gives an array of its own."""
    from functions.handler import Handler  # imports torch

    class Stand:
        settings = SimpleNamespace(replica="127.0.0.1:1", body_bytes_max=size)

        def start(self) -> None:
            """There is nothing to load."""

        async def answer(self, event: Event, replica: str, path: str, gone: object) -> Event:
            hidden = np.full(len(event.data), 1, dtype=np.uint8).data
            return Event(events.STEPPED, "/stage", "1.reply", events.TENSORS, b"head", {}, [hidden])

    left = size

    async def receive() -> dict[str, Any]:
        nonlocal left
        chunk = bytes(min(left, CHUNK_BYTES))
        left -= len(chunk)
        return {"type": "http.request", "body": chunk, "more_body": left > 0}

    sent = 0

    async def send(message: Any) -> None:
        nonlocal sent
        sent += len(message.get("body", b""))

    asked, _ = events.to_raw(Event(events.STEP, "/me", "1", events.TENSORS, b""))
    headers = [*asked, (b"content-length", str(size).encode())]
    scope = {"type": "http", "method": "POST", "path": "/", "headers": headers, "server": None}
    with _Peak() as peak:
        answer = await Handler(cast(Any, Stand())).event(scope, receive)
        await answer(scope, receive, cast(Any, send))
    assert sent == size + len(b"head")
    return peak.bytes / size


class _Peak:
    """`bytes`: the most that was allocated at once, beyond what was there before."""

    bytes = 0

    def __enter__(self) -> _Peak:
        gc.collect()
        tracemalloc.start()
        self._before, _ = tracemalloc.get_traced_memory()
        return self

    def __exit__(self, *_: object) -> None:
        self.bytes = tracemalloc.get_traced_memory()[1] - self._before
        tracemalloc.stop()
