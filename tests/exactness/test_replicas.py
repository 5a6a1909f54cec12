"""Stages with several replicas that come and go: the text stays the same, and the load goes where it should.

In front of each stage process stands a small server that behaves as Knative's queue-proxy does towards clients, and in
front of a stage's replicas another that behaves as its service does.
"""

from __future__ import annotations

import asyncio
import inspect
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import aiohttp
import httpx
import pytest
from aiohttp import web
from prometheus_client import REGISTRY

from functions.contract import events
from functions.contract.sampling import SamplingParams
from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationRequest

NEW_TOKENS = 20
LONG = 48
HALVES = ["0:2", "2:4"]
TIMEOUT_S = 60  # only reached by what would hang for ever


class Door:
    """An HTTP server that passes events on. `lanes` counts the steps that came, by lane; `kinds` events by type."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.lanes: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.targets: list[str] = []  # as the request line has them
        self.address = ""
        self._session = session
        self._runner = web.AppRunner(_application(self._answer), access_log=None, shutdown_timeout=0)

    async def open(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.address = f"{host}:{port}"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        if request.method == "GET":
            return self._probe(request)
        body = await request.read()
        self.kinds[request.headers["ce-type"]] += 1
        self.targets.append(request.raw_path)
        if request.headers["ce-type"] == events.STEP:
            self.lanes[request.headers["ce-lane"]] += 1
        return await self._event(request, body)

    def _probe(self, request: web.Request) -> web.Response:
        raise NotImplementedError

    async def _event(self, request: web.Request, body: bytes) -> web.Response:
        raise NotImplementedError

    async def _pass_on(self, url: str, request: web.Request, body: bytes) -> web.Response:
        async with self._session.post(url, data=body, headers=_ours(request.headers)) as reply:
            return web.Response(body=await reply.read(), status=reply.status, headers=_ours(reply.headers))


def _application(answer: Any) -> web.Application:
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", answer)
    return app


def _ours(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower().startswith(("ce-", "content-type"))}


class Replica(Door):
    """A stage process behind its queue-proxy."""

    stage_url = ""
    draining = False
    full = False
    step_takes_s = 0.0
    stopped: asyncio.Event | None = None  # steps wait for it
    refuses = ""  # events of this type
    on_export: asyncio.Event | None = None  # exports wait for it

    def _probe(self, request: web.Request) -> web.Response:
        assert request.headers["K-Network-Probe"] == "queue"
        assert request.headers["User-Agent"].startswith("Knative-Activator-Probe")
        return web.Response(text="shutting down\n", status=503) if self.draining else web.Response(text="queue")

    async def _event(self, request: web.Request, body: bytes) -> web.Response:
        if self.full or request.headers["ce-type"] == self.refuses:
            return web.Response(text="pending request queue full\n", status=503)
        if request.headers["ce-type"] == events.EXPORT and self.on_export is not None:
            await self.on_export.wait()
        if request.headers["ce-type"] == events.STEP:
            await asyncio.sleep(self.step_takes_s)
            if self.stopped is not None:
                await self.stopped.wait()
        return await self._pass_on(self.stage_url, request, body)

    async def holds_nothing(self) -> bool:
        """By the stage's own count of its sequences."""
        async with httpx.AsyncClient() as client:
            return "stagecraft_stage_sequences 0.0" in (await client.get(f"{self.stage_url}/metrics")).text


class Service(Door):
    """A stage's service URL: the replicas in turn, without those that drain."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        super().__init__(session)
        self.replicas: list[Replica] = []
        self.before: Callable[[str], Any] | None = None  # called with each event's type; may answer itself
        self._turn = itertools.count()

    async def _event(self, request: web.Request, body: bytes) -> web.Response:
        if self.before is not None and (answer := await self.before(request.headers["ce-type"])) is not None:
            return answer  # type: ignore[no-any-return]  # Any: see `before`
        able = [replica for replica in self.replicas if not replica.draining]
        replica = able[next(self._turn) % len(able)]
        return await self._pass_on(f"http://{replica.address}/", request, body)


class Fleet:
    """Two stages with services and replicas."""

    def __init__(self, session: aiohttp.ClientSession, start_stages: Any) -> None:
        self.services = [Service(session) for _ in HALVES]
        self.doors: list[Door] = []
        self.architecture = "llama"
        self._session = session
        self._start_stages = start_stages

    @property
    def urls(self) -> list[str]:
        return [f"http://{service.address}" for service in self.services]

    async def add(self, stage: int, **environment: str) -> Replica:
        replica = Replica(self._session)
        await self._open(replica)
        environment = {"STAGE_INDEX": str(stage), "STAGE_COUNT": str(len(HALVES)), **environment}
        started = self._start_stages(self.architecture, [HALVES[stage]], STAGE_REPLICA=replica.address, **environment)
        replica.stage_url = started.urls[0]
        self.services[stage].replicas.append(replica)
        return replica

    async def start(self) -> None:
        for service in self.services:
            await self._open(service)

    async def _open(self, door: Door) -> None:
        await door.open()
        self.doors.append(door)


@pytest.fixture
async def fleet(start_stages: Any) -> AsyncIterator[Fleet]:
    async with aiohttp.ClientSession() as session:
        fleet = Fleet(session, start_stages)
        await fleet.start()
        yield fleet
        for door in fleet.doors:
            await door.close()


async def until(condition: Callable[[], Any]) -> None:
    for _ in range(TIMEOUT_S * 100):
        result = condition()
        if await result if inspect.isawaitable(result) else result:
            return
        await asyncio.sleep(0.01)
    pytest.fail("what was waited for does not come")


async def disturbed(chain: Chain, prompt: list[int], disturb: Callable[[], Any]) -> list[int]:
    """A long answer during which `disturb` is called as the 5th token arrives."""
    tokens: list[int] = []
    async with asyncio.timeout(TIMEOUT_S):
        async for token in chain.generate(GenerationRequest(tuple(prompt), LONG)):
            tokens.append(token.id)
            if len(tokens) == 5:
                await disturb()
    return tokens


def used(replicas: list[Replica]) -> Replica:
    """The one replica that the only lane so far goes to."""
    (replica,) = (replica for replica in replicas if replica.lanes)
    return replica


# -- replicas that go


async def test_a_draining_replica_is_left_with_the_same_text_and_holds_nothing_afterwards(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet, ChainSettings(probe_every_s=0.01))
    left: list[Replica] = []

    async def drain() -> None:
        left.append(used(replicas))
        left[0].step_takes_s = 0.02  # so that the answer is not over before anybody can notice
        left[0].draining = True

    assert await disturbed(chain, prompts[0], drain) == whole_model("llama", prompts[0], LONG)
    other = next(replica for replica in replicas if replica is not left[0])
    assert left[0].lanes["0"] + other.lanes["0"] >= LONG
    assert other.lanes["0"] > 0
    for replica in replicas:
        await until(replica.holds_nothing)


async def test_a_vanished_replica_is_replaced_with_the_same_text(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet)

    async def vanish() -> None:
        gone = used(replicas)
        fleet.services[1].replicas.remove(gone)
        await gone.close()

    assert await disturbed(chain, prompts[2], vanish) == whole_model("llama", prompts[2], LONG)
    assert all(replica.lanes for replica in replicas)


async def test_a_replica_that_is_too_busy_sends_the_lane_back_to_the_service(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet)

    async def fill_up() -> None:
        full = used(replicas)
        fleet.services[1].replicas.remove(full)
        full.full = True

    assert await disturbed(chain, prompts[1], fill_up) == whole_model("llama", prompts[1], LONG)
    assert all(replica.lanes for replica in replicas)


# -- replicas that hand over what they hold


@dataclass
class Counts:
    """What stages have computed, by their own count."""

    tokens: float
    steps: float

    @classmethod
    def of(cls, replicas: Sequence[Replica]) -> Counts:
        pages = [page_of(replica.stage_url) for replica in replicas]
        return cls(
            sum(sample(page, "stagecraft_stage_tokens_total") for page in pages),
            sum(sample(page, f'stagecraft_stage_events_total{{answer="ok",type="{events.STEP}"}}') for page in pages),
        )


def page_of(stage_url: str) -> str:
    return httpx.get(f"{stage_url}/metrics").text


def sample(page: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} "))


def handovers(stage: int, outcome: str) -> float:
    labels = {"stage": str(stage), "outcome": outcome}
    return REGISTRY.get_sample_value("stagecraft_handovers_total", labels) or 0.0


async def together(
    chain: Chain, prompts: Sequence[Sequence[int]], disturb: Callable[[], Any], params: SamplingParams | None = None
) -> list[list[int]]:
    """Long answers to several prompts, during which `disturb` is called once as some sequence gets its 5th token."""
    disturbed: list[int] = []

    async def one(prompt: Sequence[int]) -> list[int]:
        tokens: list[int] = []
        async for token in chain.generate(GenerationRequest(tuple(prompt), LONG, params or SamplingParams())):
            tokens.append(token.id)
            if len(tokens) == 5 and not disturbed:
                disturbed.append(len(tokens))
                await disturb()
        return tokens

    async with asyncio.timeout(TIMEOUT_S):
        return await asyncio.gather(*(one(prompt) for prompt in prompts))


@pytest.mark.parametrize("drained", [(0,), (1,), (0, 1)])
async def test_a_draining_replica_hands_over_and_nothing_is_computed_again(
    drained: tuple[int, ...], fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [[await fleet.add(stage) for _ in range(2)] for stage in (0, 1)]
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    left: list[Replica] = []
    before = [handovers(stage, "whole") for stage in drained]

    async def drain() -> None:
        for stage in drained:
            left.append(used(replicas[stage]))
            left[-1].step_takes_s = 0.02  # so that the answers are not over before anybody can notice
            left[-1].draining = True

    asked = prompts[:4]
    assert await together(chain, asked, drain) == [whole_model("llama", prompt, LONG) for prompt in asked]
    assert [handovers(stage, "whole") for stage in drained] == [count + 1 for count in before]
    for stage in (0, 1):
        counts = Counts.of(replicas[stage])
        assert counts.tokens == sum(len(prompt) + LONG - 1 for prompt in asked), "each token once, wherever"
        assert counts.steps == sum(replica.lanes["0"] for replica in replicas[stage])
        for replica in replicas[stage]:
            await until(replica.holds_nothing)
    for stage, old in zip(drained, left, strict=True):
        new = next(replica for replica in replicas[stage] if replica is not old)
        assert new.lanes["0"] > 0
        assert (new.kinds[events.ADOPT], old.kinds[events.RELEASE]) == (1, 1)
        assert old.kinds[events.EXPORT] >= 1


async def test_sampled_answers_go_on_with_their_penalties_at_another_replica(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    params = SamplingParams(temperature=1.0, repetition_penalty=1.3, frequency_penalty=0.8, seed=11)
    expected = [await answer(chain, prompt, LONG, params) for prompt in prompts[:3]]
    for replica in replicas:
        await until(replica.holds_nothing)
        replica.lanes.clear()

    async def drain() -> None:
        old = used(replicas)
        old.step_takes_s = 0.02
        old.draining = True

    before = handovers(1, "whole")
    assert await together(chain, prompts[:3], drain, params) == expected
    assert handovers(1, "whole") == before + 1


async def test_a_lane_goes_on_where_it_is_until_another_replica_is_ready(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    await fleet.add(0)
    old, new = [await fleet.add(1) for _ in range(2)]
    fleet.services[1].replicas.remove(new)
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    steps_until_it_came: list[int] = []

    async def drain() -> None:
        old.step_takes_s = 0.02
        old.draining = True

    async def start_another(kind: str) -> None:
        """As an activator holds what comes until there is a replica."""
        if old.draining and not steps_until_it_came:
            steps_until_it_came.append(old.lanes["0"])
            await until(lambda: old.lanes["0"] >= steps_until_it_came[0] + 5)
            fleet.services[1].replicas.append(new)

    fleet.services[1].before = start_another
    before = handovers(1, "whole")
    assert await together(chain, prompts[:2], drain) == [whole_model("llama", p, LONG) for p in prompts[:2]]
    assert steps_until_it_came
    assert handovers(1, "whole") == before + 1
    assert fleet.services[1].kinds[events.STEP] == 1, "only the lane's first; the wake has named the next replica"


async def test_a_lane_leaves_though_the_first_wake_is_never_answered(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The service may have handed it to a replica that hangs, so it is asked again, long before the time is over that
    stages get to wake."""
    monkeypatch.setattr("orchestrator.stage_pool._WAKE_PATIENCE_S", 0.2)
    await fleet.add(0)
    old, new = [await fleet.add(1) for _ in range(2)]
    fleet.services[1].replicas.remove(new)
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    wakes: list[int] = []
    over = asyncio.Event()

    async def drain() -> None:
        old.step_takes_s = 0.02
        old.draining = True
        fleet.services[1].replicas.append(new)

    async def lose_the_first_wake(kind: str) -> None:
        if old.draining and kind == events.WAKE:
            wakes.append(old.lanes["0"])
            if len(wakes) == 1:
                await over.wait()

    fleet.services[1].before = lose_the_first_wake
    before = handovers(1, "whole")
    answers = await together(chain, prompts[:2], drain)
    over.set()
    assert answers == [whole_model("llama", p, LONG) for p in prompts[:2]]
    assert handovers(1, "whole") == before + 1, "the lane ended where it was: nobody was asked a second time"


async def test_a_lane_ends_on_its_old_plan_where_the_service_has_a_new_one(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    await fleet.add(0)
    old = await fleet.add(1)
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))

    async def roll_out() -> None:
        new.append(await fleet.add(1, STAGE_PLAN="another-plan"))
        old.step_takes_s = 0.02
        old.draining = True

    new: list[Replica] = []
    before = handovers(1, "stays")
    assert await together(chain, prompts[:2], roll_out) == [whole_model("llama", p, LONG) for p in prompts[:2]]
    assert handovers(1, "stays") == before + 1
    assert (new[0].kinds[events.STEP], new[0].kinds[events.WAKE]) == (0, 1)
    await until(old.holds_nothing)


@pytest.mark.parametrize("refused", ["adopt", "export"])
async def test_a_handover_that_fails_is_a_replay(
    refused: str, fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    for replica in replicas:
        replica.refuses = f"dev.stagecraft.stage.{refused}.v1"
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))

    async def drain() -> None:
        old = used(replicas)
        old.step_takes_s = 0.02
        old.draining = True

    outcome = "failed" if refused == "adopt" else "partly"
    before = handovers(1, outcome)
    assert await together(chain, prompts[:3], drain) == [whole_model("llama", p, LONG) for p in prompts[:3]]
    assert handovers(1, outcome) == before + 1
    for replica in replicas:
        await until(replica.holds_nothing)


async def test_who_leaves_during_a_handover_leaves_nothing_behind(
    fleet: Fleet, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    replicas = [await fleet.add(stage) for stage in (0, 1, 1)][1:]
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    for replica in replicas:
        replica.on_export = asyncio.Event()
    leaving = asyncio.create_task(together(chain, prompts[1:2], _nothing))

    async def drain() -> None:
        old = used(replicas)
        old.step_takes_s = 0.02
        old.draining = True
        await until(lambda: old.kinds[events.EXPORT])
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        assert old.on_export is not None
        old.on_export.set()

    assert await together(chain, prompts[:1], drain) == [whole_model("llama", prompts[0], LONG)]
    for replica in replicas:
        await until(replica.holds_nothing)


async def _nothing() -> None:
    pass


@pytest.mark.parametrize("architecture", ["llama", "falcon_h1"])
async def test_a_stage_process_that_gets_sigterm_hands_over_and_ends(
    architecture: str, fleet: Fleet, start_stages: Any, open_chain: Any, prompts: Any, whole_model: Any
) -> None:
    """With no queue-proxy in front: the process itself says that it shuts down, and serves until it holds nothing.
    Recurrent state (falcon_h1) is computed again at the other replica."""
    fleet.architecture = architecture
    first, place = await fleet.add(0), {"STAGE_INDEX": "1", "STAGE_COUNT": "2"}
    first.step_takes_s = 0.02  # so that the answers are not over before anybody can notice
    pair = [start_stages(architecture, [HALVES[1]], **place) for _ in range(2)]
    doors = [SimpleNamespace(address=stages.urls[0].removeprefix("http://"), draining=False) for stages in pair]
    fleet.services[1].replicas = cast(list[Replica], doors)
    chain = await open_chain(fleet, ChainSettings(lanes_max=1, probe_every_s=0.01))
    ended: list[Any] = []

    async def end() -> None:
        index = next(i for i, one in enumerate(pair) if sample(page_of(one.urls[0]), "stagecraft_stage_sequences"))
        doors[index].draining = True
        ended.append(pair[index].processes[0])
        ended[0].terminate()

    before = handovers(1, "whole")
    expected = [whole_model(architecture, prompt, LONG) for prompt in prompts[:3]]
    assert await together(chain, prompts[:3], end) == expected
    await asyncio.to_thread(ended[0].join, TIMEOUT_S)
    assert ended[0].exitcode == 0
    assert handovers(1, "whole") == before + (architecture == "llama")


# -- leases


async def test_nothing_expires_while_a_lane_waits_for_another_stage(
    fleet: Fleet, open_chain: Any, answer: Any, prompts: Any, whole_model: Any
) -> None:
    """Stage 1 takes longer than the leases of what stage 0 holds meanwhile."""
    first, last = [await fleet.add(stage, STAGE_KV_LEASE_S="5") for stage in (0, 1)]
    chain = await open_chain(fleet)
    last.stopped = asyncio.Event()
    last.stopped.set()

    async def hold() -> None:
        assert last.stopped is not None
        last.stopped.clear()
        renewed = first.kinds[events.RENEW]
        asyncio.get_running_loop().create_task(go_on(renewed + 4))  # of which three are a lease

    async def go_on(renewals: int) -> None:
        await until(lambda: first.kinds[events.RENEW] >= renewals)
        assert last.stopped is not None
        last.stopped.set()

    assert await disturbed(chain, prompts[0], hold) == whole_model("llama", prompts[0], LONG)
    assert sample(page_of(first.stage_url), "stagecraft_stage_sequences_expired_total") == 0
    for replica in (first, last):
        await until(replica.holds_nothing)
    await until(lambda: chain._pool._renewals._task.done())  # nothing is held
    assert not any(service.kinds[events.RENEW] for service in fleet.services)


def run_chain(urls: list[str], prompts: list[list[int]], started: Any) -> None:
    """A process that generates for ever and says when all have begun."""

    async def run() -> None:
        chain = Chain("test-plan", urls)
        await chain.start()
        begun = 0

        async def one(prompt: list[int]) -> None:
            nonlocal begun
            first = True
            while True:
                async for _ in chain.generate(GenerationRequest(tuple(prompt), LONG)):
                    begun += first
                    first = False
                    if begun == len(prompts):
                        started.set()

        await asyncio.gather(*(one(prompt) for prompt in prompts))

    asyncio.run(run())


async def test_what_a_killed_orchestrator_held_is_freed_when_its_lease_is_over(
    start_stages: Any, fork_server: Any, prompts: Any, until_empty: Any
) -> None:
    """Its clients are the same process, and go at the same moment."""
    stages = start_stages("llama", HALVES, STAGE_KV_LEASE_S="1")
    started = fork_server.Event()
    orchestrator = fork_server.Process(target=run_chain, args=(stages.urls, prompts[:4], started), daemon=True)
    orchestrator.start()
    assert await asyncio.to_thread(started.wait, TIMEOUT_S)
    await until(lambda: sample(page_of(stages.urls[1]), "stagecraft_stage_sequences"))
    orchestrator.kill()
    orchestrator.join()
    for url in stages.urls:
        await until_empty(url)
    pages = [page_of(url) for url in stages.urls]
    assert sum(sample(page, "stagecraft_stage_sequences_expired_total") for page in pages) > 0
    assert [sample(page, "stagecraft_stage_kv_bytes") for page in pages] == [0, 0]


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
        async with session.post(url, data=body, headers=_ours(headers)) as reply:
            content = await reply.read()
            lines = [f"HTTP/1.1 {reply.status} -", f"content-length: {len(content)}"]
            lines += [f"{name}: {value}" for name, value in _ours(reply.headers).items()]
        writer.write("\r\n".join([*lines, "", ""]).encode() + content)
        await writer.drain()
