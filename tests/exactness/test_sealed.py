"""Chains whose events are damaged on the way, recorded and sent again, or signed with a key that others lack."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import httpx
import pytest

from functions.contract import events
from functions.contract.errors import StaleEvent
from functions.contract.seals import Seals
from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationError
from orchestrator.stage_client import StageClient, StageUnreachable

PLAN = "test-plan"
TOKENS = 10


class Wire:
    """A TCP proxy before a stage: keeps what was asked, and flips a bit of a piece now and then, either way."""

    def __init__(self, seed: int = 0, rate: float = 0.0) -> None:
        self.rate = rate
        self.flips = 0
        self.asked: list[bytes] = []
        self.target = ""
        self.address = ""
        self._random = random.Random(seed)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts = urlsplit(self.target)
        with contextlib.suppress(OSError):
            there, back = await asyncio.open_connection(parts.hostname, parts.port)
            await asyncio.gather(self._relay(reader, back, keep=True), self._relay(there, writer, keep=False))

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, keep: bool) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                if keep:
                    self.asked.append(data)
                writer.write(self._damaged(data))
                await writer.drain()
        writer.close()

    def _damaged(self, data: bytes) -> bytes:
        if self._random.random() >= self.rate:
            return data
        self.flips += 1
        found = bytearray(data)
        found[self._random.randrange(len(found))] ^= 1 << self._random.randrange(8)
        return bytes(found)


@asynccontextmanager
async def wired(wire: Wire) -> AsyncIterator[Wire]:
    async with await asyncio.start_server(wire.serve, "127.0.0.1", 0) as server:
        wire.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield wire


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "stage-keys"
    path.write_text(f"{secrets.token_hex(32)}\n")
    return path


@asynccontextmanager
async def chained(urls: Sequence[str], seals: Seals | None, **settings: Any) -> AsyncIterator[Chain]:
    chain = Chain(PLAN, urls, ChainSettings(**settings), seals)
    try:
        await chain.start()
        yield chain
    finally:
        await chain.close()


@pytest.mark.parametrize("signed", [False, True], ids=["digest", "signed"])
async def test_flipped_bits_cost_tries_and_change_no_text(
    start_stages: Callable[..., Any], whole_model: Any, answer: Any, prompts: Any, key_file: Path, signed: bool
) -> None:
    """Anywhere: request lines, headers, lengths, bodies, of requests and replies."""
    # a length that has become larger is waited for, on both sides
    common = {"STAGE_RECEIVE_TIMEOUT_S": "0.5"} | ({"STAGE_SIGNING_KEY_FILE": str(key_file)} if signed else {})
    async with wired(Wire(seed=1)) as first, wired(Wire(seed=2)) as second:
        for index, (wire, span) in enumerate([(first, "0:2"), (second, "2:4")]):
            own = {"STAGE_INDEX": str(index), "STAGE_COUNT": "2", "STAGE_REPLICA": wire.address}
            wire.target = start_stages("llama", [span], **own, **common).urls[0]
        urls = [f"http://{wire.address}" for wire in (first, second)]
        hurried = {"step_timeout_s": 0.5, "release_timeout_s": 0.5, "attempts": 1000, "backoff_s": 0.001}
        async with chained(urls, Seals.open(key_file if signed else None), **hurried) as chain:
            first.rate = second.rate = 0.08
            found = await asyncio.gather(*(answer(chain, prompt, TOKENS) for prompt in prompts[:3]))
            first.rate = second.rate = 0.0
    assert found == [whole_model("llama", prompt, TOKENS) for prompt in prompts[:3]]
    assert first.flips + second.flips > 2


async def test_signed_chain_answers_as_ever_and_takes_no_other_event(
    start_stages: Callable[..., Any], whole_model: Any, answer: Any, prompts: Any, key_file: Path, tmp_path: Path
) -> None:
    async with wired(Wire()) as wire:
        keys = {"STAGE_SIGNING_KEY_FILE": str(key_file), "STAGE_REPLICA": wire.address}
        wire.target = start_stages("llama", ["0:4"], **keys).urls[0]
        async with chained([f"http://{wire.address}"], Seals.open(key_file)) as chain:
            assert await answer(chain, prompts[0], TOKENS) == whole_model("llama", prompts[0], TOKENS)
            await _check_refusals(wire)
            # a step that was recorded, sent again byte by byte
            recorded = next(data for data in wire.asked if b"stage.step.v1" in data and b"safetensors" in data)
            assert await _raw(wire, recorded) == (401, "stale_event")
            assert await answer(chain, prompts[1], TOKENS) == whole_model("llama", prompts[1], TOKENS)
        other = tmp_path / "other-keys"
        other.write_text(secrets.token_hex(32))
        with pytest.raises(GenerationError, match="another key") as refused:
            async with chained([f"http://{wire.address}"], Seals.open(other), wake_timeout_s=60.0):
                pass
        assert refused.value.code == "unauthorized"


async def _check_refusals(wire: Wire) -> None:
    """Of what has no signature; pages stay open."""
    headers = {"ce-specversion": "1.0", "ce-source": "/me", "ce-id": "1", "ce-plan": PLAN, "ce-stage": "0"}
    async with httpx.AsyncClient(base_url=f"http://{wire.address}") as client:
        for kind in (events.WAKE, events.STEP, events.RELEASE):
            reply = await client.post("/", headers={**headers, "ce-type": kind}, content=b"{}")
            assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")
        reply = await client.post("/", headers={**headers, "ce-type": "dev.stagecraft.stage.score.v1"}, content=b"x")
        assert (reply.status_code, reply.json()["code"]) == (401, "unauthorized")
        assert "STAGE_UNSIGNED_SCORES" in reply.json()["message"]
        for page in ("/healthz", "/readyz", "/metrics"):
            assert (await client.get(page)).status_code == 200


async def _raw(wire: Wire, data: bytes) -> tuple[int, str]:
    """Status and error code of the answer to these very bytes."""
    parts = urlsplit(wire.target)
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    writer.write(data)
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    size = int(head.partition("content-length: ")[2].partition("\r\n")[0])
    body = await reader.readexactly(size)
    writer.close()
    return int(head.split()[1]), body.partition(b'"code": "')[2].partition(b'"')[0].decode()


async def test_an_orchestrator_with_a_key_does_not_believe_a_stage_without_one(
    start_stages: Callable[..., Any], key_file: Path
) -> None:
    stages = start_stages("llama", ["0:4"])
    async with aiohttp.ClientSession() as session:
        client = StageClient(session, 0, stages.urls[0] + "/", PLAN, Seals.open(key_file))
        with pytest.raises(StageUnreachable, match="not signed with a key that this orchestrator has"):
            await client.wake(60.0)


async def test_what_is_wrong_at_the_sender_is_told(start_stages: Callable[..., Any], key_file: Path) -> None:
    """No key, and clocks that differ. An event that was only held too long, as by an activator while a stage starts, is
    signed anew."""
    stages = start_stages("llama", ["0:4"], STAGE_SIGNING_KEY_FILE=str(key_file))
    with pytest.raises(GenerationError, match=r"not signed.*STAGE_SIGNING_KEY_FILE"):
        async with chained(stages.urls, None, wake_timeout_s=60.0):
            pass
    signing, offsets_s = Seals.open(key_file), list[float]()  # of the next signatures
    signing._now_s = lambda: time.time() + (offsets_s.pop() if offsets_s else 0.0)
    async with aiohttp.ClientSession() as session:
        client = StageClient(session, 0, stages.urls[0] + "/", PLAN, signing)
        for off_s in (-3600.0, 3600.0):
            offsets_s += [off_s, off_s]
            with pytest.raises(StaleEvent, match=r"STAGE_CLOCK_SKEW_S.*NTP") as told:
                await client.wake(60.0)
            assert told.value.retriable
        offsets_s.append(-300.0)
        assert (await client.wake(60.0)).plan == PLAN
        assert offsets_s == []
