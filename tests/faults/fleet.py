"""Real processes: the replicas of every stage behind their proxies, and the orchestrator before them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from knative.kubelet.agent import Start
from knative.kubelet.agents import Agents, Process
from knative.kubelet.ports import Ports
from tests.faults.proxy import Armed, ReplicaProxy
from tests.faults.relay import Upstream
from tests.faults.router import ServiceRouter
from tests.faults.schedule import Fault
from tests.faults.wire import Message

MODEL_NAME = "soak"
PLAN = "soak"
REPLICAS = 2
_STAGE_MODULES, _ORCHESTRATOR_MODULES = ("functions.preload",), ("orchestrator.serving_imports",)
START_TIMEOUT_S = 120.0
_PROBE_S = 1.0  # a replica that takes longer to say that it is ready is not
_PROBE_EVERY_S = 0.25
_QUIET_S = 0.5  # without an event for so long, a replica that drains may end
_DRAIN_S_MAX = 15.0
_END_S_MAX = 10.0
_ORCHESTRATOR_END_S_MAX = 60.0  # much more than its grace, on a machine that is busy
_READY = Message(b"GET /readyz HTTP/1.1\r\nhost: replica\r\n\r\n", b"")


@dataclass(frozen=True, slots=True)
class Setup:
    """What runs. `spans` are the blocks of each stage; the settings go to the processes as they are."""

    model: Path
    folder: Path  # for logs
    spans: Sequence[str]
    replicas: int = REPLICAS
    stage_settings: Mapping[str, str] = field(default_factory=dict)  # STAGE_...
    orchestrator_settings: Mapping[str, str] = field(default_factory=dict)  # ORCHESTRATOR_...
    threads: int = 1


class Replica:
    """One process of a stage behind its proxy."""

    def __init__(self, stage: int, name: str) -> None:
        self.stage = stage
        self.name = name
        self.ready = False
        self.gone = False
        self.process: Process | None = None
        self.stage_port = 0
        self.proxy: ReplicaProxy

    @property
    def port(self) -> int:
        return self.proxy.port

    @property
    def takes_new(self) -> bool:
        return self.ready and not self.gone and not self.proxy.draining


class Fleet:
    """`tell` is told whatever happens to processes. To be used as a context; `urls` and `base_url` hold inside."""

    def __init__(self, setup: Setup, tell: Callable[[str], None]) -> None:
        self.setup = setup
        self.armed = [Armed(stage, tell) for stage in range(len(setup.spans))]
        self.replicas: list[Replica] = []
        self.orchestrator: Process | None = None
        self.epoch = 0  # of the orchestrator: even while one serves, odd while there is none
        self.graceful_ends: set[int] = set()  # epochs whose orchestrator was told to end, and not killed
        self.complaints: list[str] = []  # of orchestrators that did not end as they should
        self._tell = tell
        self._ports = Ports()
        self._agents = Agents(setup.folder / "agents")
        self._routers = [ServiceRouter(self._replicas_of(stage)) for stage in range(len(setup.spans))]
        self._http_port = self._ports.take()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._number = 0

    @property
    def base_url(self) -> str:
        return f"http://127.0.0.1:{self._http_port}"

    async def __aenter__(self) -> Fleet:
        try:
            for router in self._routers:
                await router.open()
            # both import for seconds, and may do so at once
            await asyncio.gather(self._agents.warm(_STAGE_MODULES), self._agents.warm(_ORCHESTRATOR_MODULES))
            places = [stage for stage in range(len(self.setup.spans)) for _ in range(self.setup.replicas)]
            await asyncio.gather(*(self.start_replica(stage) for stage in places))
            await self.start_orchestrator()
        except BaseException:
            await self.close()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._agents.close()
        for relay in [*self._routers, *(replica.proxy for replica in self.replicas)]:
            await relay.close()
        self._ports.close()

    # -- replicas

    def _replicas_of(self, stage: int) -> Callable[[], list[Replica]]:
        return lambda: [replica for replica in self.replicas if replica.stage == stage]

    async def start_replica(self, stage: int, port: int = 0) -> Replica:
        """A new one, listening at `port` (0: a free one) for those who find it by its address; loading yet."""
        self._number += 1
        replica = Replica(stage, f"stage-{stage}-replica-{self._number}")
        replica.stage_port = self._ports.take()
        replica.proxy = ReplicaProxy(replica.stage_port, self.armed[stage], self._act_on(replica))
        await replica.proxy.open(port)
        self.replicas.append(replica)
        environment = {
            **os.environ,
            "HOST": "127.0.0.1",
            "PORT": str(replica.stage_port),
            "OMP_NUM_THREADS": str(self.setup.threads),
            "STAGE_MODEL": str(self.setup.model),
            "STAGE_MODEL_NAME": MODEL_NAME,
            "STAGE_BLOCKS": self.setup.spans[stage],
            "STAGE_INDEX": str(stage),
            "STAGE_COUNT": str(len(self.setup.spans)),
            "STAGE_PLAN": PLAN,
            "STAGE_DTYPE": "float32",
            "STAGE_DEVICE": "cpu",
            "STAGE_THREADS": str(self.setup.threads),
            "STAGE_KV_BYTES_MAX": str(64 << 20),
            "STAGE_REPLICA": replica.proxy.address,
            **self.setup.stage_settings,
        }
        log = str(self.setup.folder / f"{replica.name}.log")
        start = Start((), "functions", (), environment, "", log)
        replica.process = await self._agents.run(start, _STAGE_MODULES)
        self._spawn(self._watch(replica))
        return replica

    async def _watch(self, replica: Replica) -> None:
        """Asks whether it is ready, as a kubelet does, by the way that its events take."""
        with contextlib.closing(Upstream(replica.port)) as probe:
            while not replica.gone:
                try:
                    async with asyncio.timeout(_PROBE_S):
                        replica.ready = (await probe.exchange(_READY)).status == 200 and not replica.gone
                except (TimeoutError, OSError, EOFError, ValueError):
                    replica.ready = False
                await asyncio.sleep(_PROBE_EVERY_S if replica.ready else 0.05)

    def _act_on(self, replica: Replica) -> Callable[[Fault], Awaitable[None]]:
        async def act(fault: Fault) -> None:
            work = {"kill": self._kill, "stop": self._stop, "drain": self._drain}[fault.kind]
            # a task of its own: the request that brings this about ends with the replica
            await asyncio.shield(self._spawn(work(replica, fault)))

        return act

    async def _kill(self, replica: Replica, fault: Fault) -> None:
        replaced_already = replica.proxy.draining
        if not await self.kill(replica) or replaced_already:
            return
        # a pod that is made anew has another address, a container that is restarted in its pod the same
        port = replica.port if fault.salt % 2 else 0
        self._spawn(self._replace(replica.stage, fault.seconds, port))

    async def kill(self, replica: Replica) -> bool:
        """SIGKILL, and every connection reset. False if somebody else has done it already."""
        if replica.gone:
            return False
        assert replica.process is not None
        replica.ready, replica.gone = False, True
        replica.process.send(signal.SIGKILL)
        await replica.process.ended
        await replica.proxy.close()
        self._ports.give_back(replica.stage_port)
        self.replicas.remove(replica)
        self._tell(f"killed {replica.name} at {replica.proxy.address}")
        return True

    async def _replace(self, stage: int, wait_s: float, port: int) -> None:
        await asyncio.sleep(wait_s)
        replica = await self.start_replica(stage, port)
        self._tell(f"started {replica.name} at {replica.proxy.address}")

    async def _stop(self, replica: Replica, fault: Fault) -> None:
        assert replica.process is not None
        replica.process.send(signal.SIGSTOP)
        self._tell(f"stopped {replica.name}")
        self._spawn(self._continue(replica, fault.seconds))

    async def _continue(self, replica: Replica, wait_s: float) -> None:
        assert replica.process is not None
        await asyncio.sleep(wait_s)
        replica.process.send(signal.SIGCONT)
        self._tell(f"continued {replica.name}")

    async def _drain(self, replica: Replica, fault: Fault) -> None:
        if not replica.proxy.draining and not replica.gone:
            replica.proxy.draining = True
            self._tell(f"draining {replica.name}")
            self._spawn(self._replace(replica.stage, 0, 0))
            self._spawn(self._end(replica, fault.seconds))

    async def _end(self, replica: Replica, wait_s: float) -> None:
        """As Knative ends a pod: its queue-proxy serves until it is quiet, then the process is told by SIGTERM."""
        now_s = asyncio.get_running_loop().time
        begun_s = now_s()
        await asyncio.sleep(wait_s)
        for _ in range(round(_DRAIN_S_MAX / 0.05)):
            if now_s() - max(replica.proxy.last_event_s, begun_s) > _QUIET_S:
                break
            await asyncio.sleep(0.05)
        if replica.gone:
            return
        assert replica.process is not None
        replica.process.send(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_S_MAX):
                await asyncio.shield(replica.process.ended)
        self._tell(f"ended {replica.name}: {replica.process.ended.done() and replica.process.ended.result()}")
        await self.kill(replica)

    # -- the orchestrator

    async def start_orchestrator(self) -> None:
        """Returns when it is ready."""
        environment = {
            **os.environ,
            "ORCHESTRATOR_MODEL": str(self.setup.model),
            "ORCHESTRATOR_MODEL_NAME": MODEL_NAME,
            "ORCHESTRATOR_STAGE_URLS": ",".join(f"http://{router.address}" for router in self._routers),
            "ORCHESTRATOR_PLAN": PLAN,
            "ORCHESTRATOR_HOST": "127.0.0.1",
            "ORCHESTRATOR_HTTP_PORT": str(self._http_port),
            "ORCHESTRATOR_GRPC_PORT": "0",
            **self.setup.orchestrator_settings,
        }
        log = str(self.setup.folder / f"orchestrator-{self.epoch // 2 + 1}.log")
        start = Start((), "orchestrator.server", (), environment, "", log)
        self.orchestrator = await self._agents.run(start, _ORCHESTRATOR_MODULES)
        process = self.orchestrator
        async with aiohttp.ClientSession() as session, asyncio.timeout(START_TIMEOUT_S):
            while not await _serves(session, f"{self.base_url}/v2/health/ready"):
                if process.ended.done():
                    raise RuntimeError(f"the orchestrator ended with {process.ended.result()}; see {log}")
                await asyncio.sleep(0.02)

    async def replace_orchestrator(self, wait_s: float, *, gracefully: bool = False) -> None:
        """SIGKILL, or SIGTERM and as long as it takes; and another at the same address some time later."""
        assert self.orchestrator is not None
        if gracefully:
            self.graceful_ends.add(self.epoch)
        self.epoch += 1
        self.orchestrator.send(signal.SIGTERM if gracefully else signal.SIGKILL)
        try:
            async with asyncio.timeout(_ORCHESTRATOR_END_S_MAX):
                code = await asyncio.shield(self.orchestrator.ended)
        except TimeoutError:
            self.complaints.append(f"the orchestrator ran on for {_ORCHESTRATOR_END_S_MAX:g} s after SIGTERM")
            self.orchestrator.send(signal.SIGKILL)
            code = await self.orchestrator.ended
        else:
            if gracefully and code != 0:
                self.complaints.append(f"the orchestrator ended with {code} after SIGTERM, expected 0")
        self._tell(f"{'told the orchestrator to end' if gracefully else 'killed the orchestrator'}: {code}")
        await asyncio.sleep(wait_s)
        await self.start_orchestrator()
        self.epoch += 1
        self._tell("the orchestrator is back")

    # -- small things

    async def settled(self) -> None:
        """Waits until each stage has its replicas again, all of them ready. Raises RuntimeError if they do not come."""
        for _ in range(round(START_TIMEOUT_S / 0.05)):
            if self._whole():
                return
            await asyncio.sleep(0.05)
        states = ", ".join(f"{r.name} {'is' if r.takes_new else 'is not'} ready" for r in self.replicas)
        raise RuntimeError(f"the stages do not become whole again: {states}")

    def _whole(self) -> bool:
        counts = [len(self._replicas_of(stage)()) for stage in range(len(self.setup.spans))]
        return all(count == self.setup.replicas for count in counts) and all(r.takes_new for r in self.replicas)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        return self._spawn(work)

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _serves(session: aiohttp.ClientSession, url: str) -> bool:
    try:
        async with session.get(url) as reply:
            return reply.status == 200
    except aiohttp.ClientError:
        return False
