"""Replicas that come, from zero too: the load goes where it should, and the text stays the same."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from functions.contract import events
from orchestrator.chain import ChainSettings
from tests.exactness.fleet import LONG, NEW_TOKENS, TIMEOUT_S, Fleet, ours, until

# -- replicas that come


async def test_lanes_opened_later_reach_a_replica_that_has_come_since(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """Both lanes that the stages ask for run already, and neither is full."""
    await fleet.add(0)
    first = await fleet.add(1)
    chain = await open_chain(fleet, ChainSettings(lane_age_s=0.05))
    first.stopped = asyncio.Event()
    early = [asyncio.create_task(answer(chain, prompt, LONG)) for prompt in prompts[:2]]
    await until(lambda: len(first.lanes) == 2)
    await asyncio.sleep(0.1)  # older than lane_age_s
    second = await fleet.add(1)
    fleet.services[1].replicas.remove(first)
    late = await answer(chain, prompts[2], NEW_TOKENS)
    first.stopped.set()
    assert set(second.lanes) == {"2"}
    assert late == whole_model("llama", prompts[2], NEW_TOKENS)
    assert await asyncio.gather(*early) == [whole_model("llama", prompt, LONG) for prompt in prompts[:2]]
    assert set(first.lanes) == {"0", "1"}


async def test_more_sequences_than_lanes_hold_open_more_lanes_whose_numbers_are_used_again(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    replica, _ = [await fleet.add(stage) for stage in (0, 1)]
    chain = await open_chain(fleet, ChainSettings(lane_width=1))
    for _ in range(2):
        answers = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts[:5]))
        assert answers == [whole_model("llama", prompt, NEW_TOKENS) for prompt in prompts[:5]]
        assert set(replica.lanes) == {"0", "1", "2", "3", "4"}


async def test_lanes_max_bounds_the_lanes(fleet: Fleet, open_chain: Any, answer: Any, prompts: Any) -> None:
    replica, _ = [await fleet.add(stage) for stage in (0, 1)]
    chain = await open_chain(fleet, ChainSettings(lane_width=1, lanes_max=3))
    answers = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts))
    assert {len(tokens) for tokens in answers} == {NEW_TOKENS}
    assert set(replica.lanes) == {"0", "1", "2"}


async def test_replicas_with_less_memory_than_thought_fail_nobody(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """The chain wakes the larger one and takes the other to be alike."""
    bytes_per_token = 256  # 2 blocks, keys and values, 2 heads of 8 floats
    for stage in (0, 1):
        await fleet.add(stage, STAGE_KV_BYTES_MAX=str(400 * bytes_per_token))
    chain = await open_chain(fleet, ChainSettings(lane_width=2, backoff_s=0.01))
    small = await fleet.add(1, STAGE_KV_BYTES_MAX=str(80 * bytes_per_token))
    async with asyncio.timeout(TIMEOUT_S):
        answers = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts[:7]))
    assert answers == [whole_model("llama", prompt, NEW_TOKENS) for prompt in prompts[:7]]
    assert small.lanes


# -- from zero


async def test_after_idleness_all_stages_are_woken_at_once(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """No service answers anything before each has been sent a wake, so one after another would never end."""
    for stage in (0, 1):
        await fleet.add(stage)
    chain = await open_chain(fleet, ChainSettings(idle_before_wake_s=0.0))
    woken = [asyncio.Event() for _ in fleet.services]

    def holding(stage: int) -> Callable[[str], Any]:
        async def hold(kind: str) -> None:
            if kind == events.WAKE:
                woken[stage].set()
            for event in woken:
                await event.wait()

        return hold

    for stage, service in enumerate(fleet.services):
        service.before = holding(stage)
    async with asyncio.timeout(TIMEOUT_S):
        answers = await asyncio.gather(*(answer(chain, prompt, NEW_TOKENS) for prompt in prompts[:3]))
    assert answers == [whole_model("llama", prompt, NEW_TOKENS) for prompt in prompts[:3]]
    assert [service.kinds[events.WAKE] for service in fleet.services] == [2, 2], "one at the start, one after idleness"


async def test_a_service_may_hold_a_step_for_as_long_as_a_stage_takes_to_wake(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """Longer than a replica may take for a step: the service is asked again, with more patience, and more often than a
    step that fails would be."""
    for stage in (0, 1):
        await fleet.add(stage)
    chain = await open_chain(fleet, ChainSettings(step_timeout_s=0.1, hang_floor_s=0.1, attempts=2))
    third = asyncio.Event()

    async def hold_steps(kind: str) -> None:
        if kind == events.STEP:
            if fleet.services[1].kinds[events.STEP] == 3:
                chain.settings = ChainSettings()  # later steps, to the replica, may take longer on a busy machine
                third.set()
            await third.wait()

    fleet.services[1].before = hold_steps
    assert await answer(chain, prompts[0], NEW_TOKENS) == whole_model("llama", prompts[0], NEW_TOKENS)
    assert fleet.services[1].kinds[events.STEP] >= 3


async def test_a_wake_that_fails_fails_no_request(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    for stage in (0, 1):
        await fleet.add(stage)
    chain = await open_chain(fleet, ChainSettings(idle_before_wake_s=0.0))

    async def refuse_wakes(kind: str) -> web.Response | None:
        return web.Response(text="no such revision", status=500) if kind == events.WAKE else None

    fleet.services[1].before = refuse_wakes
    assert await answer(chain, prompts[0], NEW_TOKENS) == whole_model("llama", prompts[0], NEW_TOKENS)
    assert fleet.services[1].kinds[events.WAKE] == 2


async def test_stages_without_requests_are_left_alone(fleet: Fleet, open_chain: Any, answer: Any, prompts: Any) -> None:
    """Nothing that the chain does by itself may keep a stage from zero or wake it."""
    for stage in (0, 1):
        await fleet.add(stage)
    chain = await open_chain(fleet, ChainSettings(probe_every_s=0.01))
    await answer(chain, prompts[0], NEW_TOKENS)
    await until(lambda: all(service.replicas[0].kinds[events.RELEASE] for service in fleet.services))
    before = [dict(door.kinds) for door in fleet.doors]
    await asyncio.sleep(0.2)
    assert [dict(door.kinds) for door in fleet.doors] == before
    assert not any(service.kinds[events.RELEASE] for service in fleet.services)


# -- names


async def test_services_are_asked_by_the_proxy_and_replicas_are_not(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cluster-local names have no DNS on a single machine; the ingress there is the proxy that knows them."""
    for stage in (0, 1):
        await fleet.add(stage)
    names = [f"http://demo-stage-{stage}.default.svc.cluster.local" for stage in (0, 1)]
    ingress = Ingress(dict(zip([name.removeprefix("http://") for name in names], fleet.urls, strict=True)))
    await ingress.open()
    monkeypatch.setenv("http_proxy", ingress.url)
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    chain = await open_chain(SimpleNamespace(urls=names))
    assert await answer(chain, prompts[0], NEW_TOKENS) == whole_model("llama", prompts[0], NEW_TOKENS)
    # a wake and the lane's first step
    assert sorted(ingress.targets) == sorted([f"{name}/" for name in names] * 2)
    assert all(service.replicas[0].kinds[events.STEP] == NEW_TOKENS for service in fleet.services)
    assert {target for service in fleet.services for target in service.replicas[0].targets} == {"/"}
    await chain.close()
    await ingress.close()


class Ingress:
    """A forward proxy: takes requests in absolute form and passes them on by host. `targets` are the request lines'."""

    def __init__(self, backends: dict[str, str]) -> None:
        self.targets: list[str] = []
        self._backends = backends
        self._server: asyncio.Server | None = None

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)

    async def close(self) -> None:
        assert self._server is not None
        self._server.close()
        await self._server.wait_closed()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with aiohttp.ClientSession() as session:
                while line := await reader.readline():
                    await self._exchange(line.decode().split()[1], reader, writer, session)
        finally:
            writer.close()

    async def _exchange(
        self, target: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, session: aiohttp.ClientSession
    ) -> None:
        self.targets.append(target)
        headers = {}
        while (line := (await reader.readline()).decode().strip()) != "":
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        body = await reader.readexactly(int(headers["content-length"]))
        url = self._backends[headers["host"]]
        async with session.post(url, data=body, headers=ours(headers)) as reply:
            content = await reply.read()
            lines = [f"HTTP/1.1 {reply.status} -", f"content-length: {len(content)}"]
            lines += [f"{name}: {value}" for name, value in ours(reply.headers).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()
