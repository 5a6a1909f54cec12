"""Streams to clients that read slowly, or not at all."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from orchestrator.openai_api import EventStream


class Reader:
    """Takes each event after `takes_s`."""

    def __init__(self, takes_s: float) -> None:
        self.takes_s = takes_s
        self.events = 0
        self.ended = False

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body" and message["body"]:
            await asyncio.sleep(self.takes_s)
            self.events += 1
        self.ended = message["type"] == "http.response.body" and not message["more_body"]


class Source:
    """So many events, and whether their making was stopped."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.closed: list[str] = []

    async def make(self, name: str) -> AsyncGenerator[Any, None]:
        try:
            for _ in range(self.count):
                yield b"data: 1\n\n"
        finally:
            self.closed.append(name)


async def stream(source: Source, reader: Reader, reader_timeout_s: float) -> None:
    events, pieces = source.make("events"), source.make("pieces")
    await anext(pieces)
    await EventStream(events, pieces, {}, reader_timeout_s)({}, reader.send, reader.send)


async def test_a_reader_that_takes_nothing_is_cut_off() -> None:
    source, reader = Source(10), Reader(takes_s=3600)
    with pytest.raises(asyncio.CancelledError):
        await stream(source, reader, reader_timeout_s=0.01)
    assert (reader.events, reader.ended) == (0, False)
    assert source.closed == ["events", "pieces"]


async def test_a_slow_reader_gets_everything() -> None:
    """All in all it takes far longer than the limit."""
    source, reader = Source(40), Reader(takes_s=0.01)
    await stream(source, reader, reader_timeout_s=0.2)
    assert (reader.events, reader.ended) == (40, True)
    assert source.closed == ["events", "pieces"]
