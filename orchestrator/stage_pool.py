"""The stages of a chain as it knows them: their clients, what their replicas hold, waking them, freeing what they hold.

What a stage can hold is learnt from its wakes. After some idle time all stages may be at zero; they are woken together,
since one after another would take long.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Coroutine, Iterable, Sequence
from typing import Any

import aiohttp
import structlog

from functions.contract.errors import StageError
from functions.contract.messages import StageInfo, encode_sequences
from functions.contract.seals import Seals
from orchestrator.chain_settings import ChainSettings
from orchestrator.generation import GenerationError
from orchestrator.kv_ledger import KvLedger
from orchestrator.renewals import Held, Renewals
from orchestrator.replica_watch import ReplicaWatch
from orchestrator.running import Caches
from orchestrator.stage_client import StageClient, StageSilent, StageUnreachable

log = structlog.get_logger()

_WAKE_PATIENCE_S = 30.0  # most stages are awake by then


class StagePool:
    """`open` comes before all else, `close` after it. `settings` may be replaced at any time; `changed` is called when
    there may be more memory than before, `in_use` tells the replicas that lanes are tied to, `held` what they hold."""

    def __init__(
        self,
        plan_digest: str,
        urls: Sequence[str],
        settings: ChainSettings,
        seals: Seals,
        in_use: Callable[[], set[str]],
        held: Callable[[], Held],
        changed: Callable[[], None],
    ) -> None:
        self.settings = settings
        self.infos: tuple[StageInfo, ...] = ()  # empty until all have woken, and after `close`
        self.clients: list[StageClient] = []
        self.kv = KvLedger(len(urls))
        self.releases: set[asyncio.Task[None]] = set()
        self._plan = plan_digest
        self._seals = seals
        self._urls = tuple(url.rstrip("/") + "/" for url in urls)
        self._in_use = in_use
        self._held = held
        self._changed = changed
        self._wakes: dict[int, asyncio.Task[None]] = {}
        self._watch: ReplicaWatch | None = None
        self._renewals: Renewals | None = None
        self._session: aiohttp.ClientSession | None = None

    def __len__(self) -> int:
        return len(self._urls)

    async def open(self) -> None:
        """Wakes all stages at once and returns when the last has answered. Raises GenerationError if they do not fit
        together, or if one does not answer in time."""
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300))
        self.clients = [StageClient(self._session, i, url, self._plan, self._seals) for i, url in enumerate(self._urls)]
        self._watch = ReplicaWatch(self._session, self.settings.probe_every_s, self._in_use)
        self._renewals = Renewals(self.clients, self._held, self._lease_s, self.settings.release_timeout_s)
        infos = await asyncio.gather(*(self._wake(stage) for stage in self.clients))
        _check_chain(infos)
        for info in infos:
            self.learn(info)
            self.kv.resize(info.stage, replica_url(info.replica))
        self.infos = tuple(infos)

    async def close_wakes(self) -> None:
        """No stage is woken from now on."""
        self.infos = ()
        await _ended(self._wakes.values())

    async def close(self, release_timeout_s: float) -> None:
        """Closes all connections; releases that are on their way get `release_timeout_s`."""
        if self.releases:
            _, late = await asyncio.wait(self.releases, timeout=release_timeout_s)
            for task in late:
                task.cancel()
        if self._watch is not None:
            await self._watch.close()
        if self._renewals is not None:
            await self._renewals.close()
        for stage in self.clients:
            stage.close()
        if self._session is not None:
            await self._session.close()

    # -- replicas

    @property
    def draining(self) -> set[str]:
        """The replicas in use that are about to end, or have ended."""
        assert self._watch is not None  # `open` comes first
        return self._watch.draining

    @property
    def gone(self) -> set[str]:
        """Those of them that have ended."""
        assert self._watch is not None
        return self._watch.gone

    def taken(self, stage: StageClient, replica: str) -> None:
        """A lane is tied to this replica from now on."""
        assert self._watch is not None
        assert self._renewals is not None
        self._watch.begin()
        self._renewals.begin()
        if not self.kv.known(stage.index, replica):
            self.spawn(self._ask(stage, replica))

    async def release(self, sequences: list[int], caches: Caches) -> None:
        """A stage that was never asked holds nothing, and asking it might wake it."""
        places = zip(self.clients, caches.home, caches.asked, strict=True)
        await asyncio.gather(*(self.release_at(stage, url, sequences) for stage, url, asked in places if asked))

    async def release_at(self, stage: StageClient, url: str | None, sequences: list[int]) -> None:
        """One that cannot be reached is most likely gone with all it had."""
        try:
            await stage.release(encode_sequences(sequences), url, self.settings.release_timeout_s)
        except (StageUnreachable, StageError) as error:
            log.info("release_failed", stage=stage.index, sequences=len(sequences), error=str(error))

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Does something beside the lanes that `close` waits for."""
        task = asyncio.create_task(work)
        self.releases.add(task)
        task.add_done_callback(self.releases.discard)

    # -- waking

    def wake_all(self) -> None:
        """All stages at once: after some idle time they may all be at zero, and one after another would take long.
        A lane's first step to a stage waits for that stage's wake, so that a cold stage is asked by one event and not
        by one a lane, which would start more replicas than are needed."""
        for stage in self.clients:
            if stage.index not in self._wakes:
                self._wakes[stage.index] = asyncio.create_task(self._refresh(stage))

    async def woken(self, stage: StageClient) -> None:
        """Returns once no wake of the stage is on its way, whatever came of it: one that fails must not fail a step
        that may succeed."""
        if wake := self._wakes.get(stage.index):
            await asyncio.wait([wake])

    async def _refresh(self, stage: StageClient) -> None:
        try:
            info = await self.ask_service(stage, self.settings.wake_timeout_s)
            infos = [info if old.stage == info.stage else old for old in self.infos]
            _check_chain(infos)
            self.infos = tuple(infos)
            self.learn(info)
            self.kv.resize(info.stage, replica_url(info.replica))
            self._changed()
        except (StageUnreachable, StageError, GenerationError) as error:
            log.warning("wake_failed", stage=stage.index, error=str(error))
        finally:
            self._wakes.pop(stage.index, None)

    async def ask_service(self, stage: StageClient, timeout_s: float) -> StageInfo:
        """The answer to a wake. The service may hold it until there is a replica, or hand it to one that hangs, so it
        is asked again, with more and more patience."""
        patience_s = _WAKE_PATIENCE_S
        while patience_s < timeout_s:
            try:
                return await stage.wake(patience_s)
            except StageSilent:
                timeout_s -= patience_s
                patience_s *= 2
        return await stage.wake(timeout_s)

    async def _ask(self, stage: StageClient, replica: str) -> None:
        """Learns the memory of a replica that a step has found."""
        try:
            self.learn(await stage.wake(self.settings.release_timeout_s, replica))
        except (StageUnreachable, StageError) as error:
            log.info("replica_not_asked", stage=stage.index, replica=replica, error=str(error))

    def learn(self, info: StageInfo) -> None:
        """A replica has told its memory."""
        total = info.kv_bytes_max // max(1, info.kv_bytes_per_token)
        self.kv.learn(info.stage, replica_url(info.replica), info.kv_tokens_free, total)

    def _lease_s(self) -> float:
        return min((info.kv_lease_s for info in self.infos if info.kv_lease_s), default=0.0)

    async def _wake(self, stage: StageClient) -> StageInfo:
        """Tries until the stage answers: its port may not be open yet."""
        deadline_s = asyncio.get_running_loop().time() + self.settings.wake_timeout_s
        while True:
            left_s = deadline_s - asyncio.get_running_loop().time()
            try:
                return await self.ask_service(stage, max(left_s, 0.1))
            except (StageUnreachable, StageError) as error:
                if isinstance(error, StageError) and not error.retriable:
                    raise GenerationError(f"stage {stage.index}: {error}", status=503, code=error.code) from None
                # not there yet, a replica that is about to end, or an event that was damaged on the way
                if left_s <= 0:
                    raise GenerationError(str(error), status=503, code="stage_unavailable") from None
                await asyncio.sleep(self.settings.backoff_s)


def replica_url(replica: str) -> str:
    """HOST:PORT, as replies name it, as a URL."""
    return f"http://{replica}/"


async def _ended(tasks: Iterable[asyncio.Task[None]]) -> None:
    tasks = list(tasks)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _check_chain(infos: Sequence[StageInfo]) -> None:
    """Raises GenerationError unless the stages' blocks follow each other and their hidden states fit."""
    ends = [info.blocks for info in infos]
    follow = all(a[1] == b[0] for a, b in itertools.pairwise(ends))
    alike = {(info.model, info.dtype, info.hidden_size, info.stages) for info in infos}
    if ends[0][0] != 0 or not follow or len(alike) != 1 or infos[0].stages != len(infos):
        raise GenerationError(
            f"the stages do not form one model: {[(info.model, info.dtype, info.blocks) for info in infos]}",
            status=503,
            code="plan_mismatch",
        )
