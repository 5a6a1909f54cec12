"""The chain of stages as one generator of tokens: admission, lanes, recovery, release.

Each lane is a task that sends its step through all stages, one after another, books the answer and starts over. With
as many lanes as stages the pipeline is full: while lane 0 is in stage 1, lane 1 is in stage 0. A lane with a prompt to
compute fills it alone: its next step sets out as soon as the first stage is free. Lanes are opened when sequences come
and end when they are empty.

    generate() -> waiting line -> lane -> step: stage 0 -> stage 1 -> ... -> samples -> generate() yields tokens

There are two waiting lines. Nobody of the batch line is let in while an interactive sequence waits, and while there is
interactive load the batch line leaves a share of the KV memory free. What runs is never interrupted.

A lane's first event to a stage goes to the stage's service, which chooses a replica (and starts one where there is
none); the reply names it, and from then on the lane goes there, where its caches are. A lane whose replica drains,
vanishes or is too busy goes back to the service; what the new replica lacks is sent again.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import secrets
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import aiohttp
import structlog

from functions.contract.errors import InvalidEvent, KvExhausted, NotReady, StageError, WrongPosition
from functions.contract.frames import Buffer
from functions.contract.messages import KV_PAGE_TOKENS, SEQUENCE_ID_BOUND, Sampled, Samples, StageInfo, encode_release
from functions.contract.seals import Seals
from orchestrator import chain_metrics as metrics
from orchestrator import lanes
from orchestrator.generation import GenerationError, GenerationRequest, Priority, Token
from orchestrator.kv_ledger import KvLedger
from orchestrator.replica_watch import ReplicaWatch
from orchestrator.stage_client import StageClient, StageUnreachable
from orchestrator.window import Flight, Window

log = structlog.get_logger()

_CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ChainSettings:
    spread: int = 0  # stages that compute at once: so many lanes, and steps of a lane, fill the pipeline; 0: all stages
    lane_width: int = 64  # sequences
    lanes_max: int = 0  # 0: no bound
    lane_age_s: float = 5.0  # older lanes take no new sequences, see lanes.place; 0: none grows old
    step_tokens_max: int = 512  # prefill chunks and decode tokens of one step
    waiting_max: int = 1024  # sequences admitted but not yet in a lane, of each priority
    batch_share: float = 0.75  # of KV memory, and of bounded lanes, that batches may fill up beside interactive load
    batch_alone_after_s: float = 5.0  # without interactive load for so long, batches may use all
    wake_timeout_s: float = 600.0
    step_timeout_s: float = 120.0
    release_timeout_s: float = 10.0
    attempts: int = 8  # steps in a row without progress before a sequence fails
    backoff_s: float = 0.1  # doubled with each attempt
    probe_every_s: float = 1.0  # how often replicas in use are asked whether they drain
    idle_before_wake_s: float = 2.0  # with no lane for so long the stages may be at zero, and are woken together


@dataclass(eq=False)
class _Job:
    """A sequence in the chain, with the line its tokens leave by."""

    sequence: lanes.Sequence
    kv_tokens: int
    out: asyncio.Queue[Token | GenerationError] = field(default_factory=asyncio.Queue)

    @property
    def priority(self) -> Priority:
        return self.sequence.request.priority


@dataclass(eq=False)
class _Lane:
    slot: int  # a small number, used again by later lanes
    opened_s: float
    progress_s: float  # when a step was last answered
    route: list[str | None]  # replica per stage, None: ask the service
    home: list[str | None]  # replica per stage that holds the lane's caches, also when the route avoids it
    asked: list[bool]  # stages that have been sent a step
    doors: list[asyncio.Lock]  # of each stage: one step of the lane is in it, the next ones wait in their order
    window: Window  # steps on their way
    news: asyncio.Event = field(default_factory=asyncio.Event)  # more may be sent, or has come back
    jobs: dict[int, _Job] = field(default_factory=dict)  # by sequence, in the order in which they came
    suspects: list[_Job] = field(default_factory=list)  # one of them broke a step: they go on one at a time

    @property
    def name(self) -> str:
        return str(self.slot)

    @property
    def kv_tokens(self) -> int:
        return sum(job.kv_tokens for job in self.jobs.values())

    @property
    def caches(self) -> _Caches:
        return _Caches(tuple(self.home), tuple(self.asked))


@dataclass(frozen=True, slots=True)
class _Caches:
    """Where a lane's caches were when a sequence left it."""

    home: tuple[str | None, ...]
    asked: tuple[bool, ...]


class Chain:
    """Implements `orchestrator.generation.Generator` over stages that run elsewhere."""

    def __init__(
        self,
        plan_digest: str,
        stage_urls: Sequence[str],
        settings: ChainSettings | None = None,
        seals: Seals | None = None,
    ) -> None:
        self.settings = settings or ChainSettings()
        self.infos: tuple[StageInfo, ...] = ()
        self._plan = plan_digest
        self._seals = seals or Seals()
        self._urls = tuple(url.rstrip("/") + "/" for url in stage_urls)
        self._stages: list[StageClient] = []
        self._lanes: list[_Lane] = []
        self._waiting: dict[Priority, deque[_Job]] = {priority: deque() for priority in get_args(Priority)}
        self._interactive = 0  # sequences, waiting and running
        self._interactive_s = -math.inf  # when the last of them left
        self._kv = KvLedger(len(self._urls))
        self._tasks: set[asyncio.Task[None]] = set()  # lanes, and their steps on the way
        self._wakes: dict[int, asyncio.Task[None]] = {}
        self._releases: set[asyncio.Task[None]] = set()
        self._active_s = 0.0  # when the last lane ended
        self._watch: ReplicaWatch | None = None
        self._session: aiohttp.ClientSession | None = None

    # -- what endpoints use

    @property
    def ready(self) -> bool:
        return bool(self.infos)

    @property
    def context_length(self) -> int:
        return min(info.max_positions for info in self.infos)

    @property
    def vocab_size(self) -> int:
        return self.infos[-1].vocab_size

    async def start(self) -> None:
        """Wakes all stages at once; ready as soon as the last has answered. Raises GenerationError if they do not fit
        together, or if one does not answer in time."""
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300))
        self._stages = [StageClient(self._session, i, url, self._plan, self._seals) for i, url in enumerate(self._urls)]
        self._watch = ReplicaWatch(self._session, self.settings.probe_every_s, self._replicas)
        infos = await asyncio.gather(*(self._wake(stage) for stage in self._stages))
        _check_chain(infos)
        for info in infos:
            self._learn(info)
            self._kv.resize(info.stage, _replica_url(info.replica))
        self._active_s = _now_s()
        self.infos = tuple(infos)

    async def close(self) -> None:
        """Ends the lanes; sequences on their way end with an error."""
        self.infos = ()
        tasks = [*self._tasks, *self._wakes.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        jobs = [job for line in self._waiting.values() for job in line]
        jobs += [job for lane in self._lanes for job in lane.jobs.values()]
        for line in self._waiting.values():
            line.clear()
        for lane in self._lanes:
            self._spawn(self._release(list(lane.jobs), lane.caches))
            metrics.RUNNING.labels(lane.name).set(0)
        self._lanes.clear()
        if self._releases:
            _, late = await asyncio.wait(self._releases, timeout=_CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()
        _fail(jobs, GenerationError("the server is shutting down", status=503, code="shutting_down"))
        if self._watch is not None:
            await self._watch.close()
        for stage in self._stages:
            stage.close()
        if self._session is not None:
            await self._session.close()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """See `Generator.generate`."""
        job = self._admit(request)
        finish = None
        try:
            while finish is None:
                item = await job.out.get()
                if isinstance(item, GenerationError):
                    raise item
                finish = item.finish
                yield item
        finally:
            self._drop(job)

    # -- admission

    def _admit(self, request: GenerationRequest) -> _Job:
        if not self.ready:
            raise GenerationError("the stages are not ready yet", status=503, code="not_ready", retry_after_s=1)
        self._check(request)
        line = self._waiting[request.priority]
        if len(line) >= self.settings.waiting_max:
            raise GenerationError(
                f"{len(line)} requests are waiting, which is the limit; try again later",
                status=429,
                code="overloaded",
                retry_after_s=5,
            )
        tokens = len(request.prompt) + request.max_tokens
        sequence = lanes.Sequence(_new_id(), request)
        job = _Job(sequence, -(-tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS)
        if job.kv_tokens > self._kv.largest:
            raise GenerationError(
                f"prompt and answer of {tokens} tokens do not fit into the KV memory of a stage; ask for less, or "
                "give the stages more",
                status=400,
                code="kv_memory_exceeded",
                param="max_tokens",
            )
        self._interactive += job.priority == "interactive"
        line.append(job)
        self._fill_lanes()
        return job

    def _check(self, request: GenerationRequest) -> None:
        if not request.prompt:
            raise GenerationError("the prompt is empty", status=400, code="empty_prompt", param="prompt")
        if request.max_tokens < 1:
            raise GenerationError("max_tokens must be at least 1", status=400, code="invalid_value", param="max_tokens")
        if not all(0 <= token < self.vocab_size for token in request.prompt):
            raise GenerationError(
                f"token ids must be in 0..{self.vocab_size - 1}", status=400, code="invalid_value", param="prompt"
            )
        total = len(request.prompt) + request.max_tokens
        if total > self.context_length:
            raise GenerationError(
                f"the prompt has {len(request.prompt)} tokens and {request.max_tokens} were asked for, together "
                f"{total}; this model takes at most {self.context_length}",
                status=400,
                code="context_length_exceeded",
                param="max_tokens" if len(request.prompt) < self.context_length else "prompt",
            )

    def _fill_lanes(self) -> None:
        """Moves waiting sequences into lanes while there is room and KV memory: interactive ones, and once none of them
        waits those of batches. Within a line first come, first served."""
        for line in self._waiting.values():
            if not self.ready or not self._let_in(line):
                break
        for priority, line in self._waiting.items():
            metrics.WAITING.labels(priority).set(len(line))

    def _let_in(self, line: deque[_Job]) -> bool:
        """Whether nobody is left in the line."""
        while line:
            lane = self._place(line[0])
            if lane is None:
                return False
            job = line.popleft()
            self._kv.promise(lane.home, job.kv_tokens)
            lane.jobs[job.sequence.id] = job
            lane.news.set()
        return True

    def _place(self, job: _Job) -> _Lane | None:
        now_s = _now_s()
        share = self._share_of(job, now_s)
        states = [
            lanes.LaneState(len(lane.jobs), now_s - lane.opened_s, self._kv.fits(lane.home, job.kv_tokens, share))
            for lane in self._lanes
        ]
        rule = self._rule(share)
        index = lanes.place(states, rule, may_open=self._kv.fits([None] * len(self._stages), job.kv_tokens, share))
        if index is None:
            return None
        return self._lanes[index] if index < len(self._lanes) else self._open_lane(now_s)

    def _share_of(self, job: _Job, now_s: float) -> float:
        """The part of everything that may be in use once the sequence has been let in."""
        beside_others = self._interactive or now_s - self._interactive_s < self.settings.batch_alone_after_s
        return self.settings.batch_share if job.sequence.is_batch and beside_others else 1.0

    def _rule(self, share: float) -> lanes.LaneRule:
        width, lanes_max = self.settings.lane_width, self.settings.lanes_max
        if lanes_max:  # else whoever finds no seat opens a lane
            width = max(1, int(width * share))
        return lanes.LaneRule(self._spread, width, lanes_max, self.settings.lane_age_s)

    @property
    def _spread(self) -> int:
        return self.settings.spread or len(self._stages)

    def _drop(self, job: _Job) -> None:
        """The consumer is gone: a waiting sequence leaves at once, a running one before the lane's next step."""
        job.sequence.cancelled = True
        if job.priority == "interactive":
            self._interactive -= 1
            self._interactive_s = _now_s()
        line = self._waiting[job.priority]
        if job in line:
            line.remove(job)
            self._fill_lanes()  # others may have waited for it alone

    # -- lanes

    def _open_lane(self, now_s: float) -> _Lane:
        if not self._lanes and now_s - self._active_s >= self.settings.idle_before_wake_s:
            self._wake_all()
        used, count = {lane.slot for lane in self._lanes}, len(self._stages)
        slot = next(slot for slot in itertools.count() if slot not in used)
        lane = _Lane(
            slot, now_s, now_s, route=[None] * count, home=[None] * count, asked=[False] * count,
            doors=[asyncio.Lock() for _ in range(count)], window=Window(self._spread),
        )  # fmt: skip
        self._lanes.append(lane)
        self._start(self._run_lane(lane))
        return lane

    async def _run_lane(self, lane: _Lane) -> None:
        try:
            self._sweep(lane)
            while lane.jobs:
                if not self._send(lane):
                    await lane.news.wait()
                    lane.news.clear()
                await self._take_in(lane)
                self._sweep(lane)
        except Exception as error:  # a mistake of ours must not leave anybody waiting
            log.exception("lane_failed", lane=lane.name)
            _fail(lane.jobs.values(), _internal(error))
        self._lanes.remove(lane)  # not when cancelled: `close` looks after what is left
        self._active_s = _now_s()

    def _sweep(self, lane: _Lane) -> None:
        """Takes out sequences that have ended, frees their KV in every stage, and lets others in. One that has a step
        on its way stays until that has ended: what a stage frees before would be filled again."""
        gone = [job for job in lane.jobs.values() if job.sequence.cancelled and not job.sequence.in_flight]
        if gone:
            for job in gone:
                del lane.jobs[job.sequence.id]
            lane.suspects = [job for job in lane.suspects if not job.sequence.cancelled]
            self._let_go(lane, gone)
        self._fill_lanes()
        metrics.RUNNING.labels(lane.name).set(len(lane.jobs))

    def _send(self, lane: _Lane) -> bool:
        """Sends the lane's next step on its way, if there is one to be sent now. True if anything has changed."""
        if not lane.window.takes_more or not self._avoid_draining(lane) or (lane.suspects and lane.window):
            return False
        going = [job for job in lane.suspects[:1] or lane.jobs.values() if not job.sequence.cancelled]
        try:
            flight = lane.window.send([job.sequence for job in going], self.settings.step_tokens_max)
        except Exception as error:  # a mistake of ours must not leave anybody waiting
            if lane.window:
                return False  # then it is made again once it is the only one
            log.exception("lane_failed", lane=lane.name)
            _blame(lane, going, _internal(error))
            return True
        if flight is not None:
            self._start(self._fly(lane, flight))
        return flight is not None

    def _avoid_draining(self, lane: _Lane) -> bool:
        """Between two steps, so that none begins at one replica and ends at another. False until those on their way
        have ended."""
        assert self._watch is not None
        draining = [stage for stage, url in enumerate(lane.route) if url in self._watch.draining]
        if draining and lane.window:
            return False
        for stage in draining:
            lane.route[stage] = None
        return True

    async def _fly(self, lane: _Lane, flight: Flight) -> None:
        """Takes a step through the stages. Whatever comes of it is left in the flight, for the lane to find."""
        try:
            flight.samples = await self._pass(lane, flight)
        except Exception as error:  # also a mistake of ours, which must not leave anybody waiting
            flight.error = error
        flight.ended = True
        lane.news.set()

    async def _take_in(self, lane: _Lane) -> None:
        """Books and hands out what has come back. After a failure, once nothing is on its way: what follows from it."""
        while (tokens := lane.window.book()) is not None:
            lane.suspects = lane.suspects[1:]
            lane.progress_s = _now_s()
            self._deliver(lane, tokens)
        failed = lane.window.clear()
        if failed:
            for flight in failed:
                if isinstance(flight.error, WrongPosition):
                    self._rewind(lane, flight.error)
            await self._recover(lane, failed[0])

    async def _pass(self, lane: _Lane, flight: Flight) -> Sequence[Sampled] | None:
        """One step through all stages; None if it was stopped. The bytes between stages are relayed unopened."""
        body: Buffer = b"".join(flight.step.to_body())
        with metrics.STEP_SECONDS.time():
            for stage in self._stages:
                async with lane.doors[stage.index]:
                    if lane.window.stops(flight):
                        return None
                    body = await self._hop(lane, stage, body)
                    flight.passed += 1
                lane.news.set()
        try:
            return Samples.from_body(body).items
        except InvalidEvent as error:  # not ours but the last stage's
            raise StageUnreachable(f"the last stage answered no samples: {error}") from None

    async def _hop(self, lane: _Lane, stage: StageClient, body: Buffer) -> Buffer:
        if wake := self._wakes.get(stage.index):
            # whatever comes of it: a wake that fails must not fail a step that may succeed
            await asyncio.wait([wake])
        url, timeout_s = lane.route[stage.index], self.settings.step_timeout_s
        if url is None:  # there may be no replica, and the service holds the event until there is
            timeout_s = max(timeout_s, self.settings.wake_timeout_s - (_now_s() - lane.progress_s))
        lane.asked[stage.index] = True
        try:
            with metrics.HOP_SECONDS.labels(stage.index).time():
                reply = await stage.step(body, lane.name, url, timeout_s)
        except (StageUnreachable, NotReady):
            lane.route[stage.index] = None  # the next try asks the service for a replica
            raise
        except KvExhausted:
            if url is not None:
                self._kv.full(stage.index, url)
            raise
        metrics.HOP_BYTES.labels(stage.index).inc(len(body))
        replica = reply.extensions.get("replica")
        if replica and stage.url.startswith("http://"):  # behind TLS a replica has no address that a client could use
            self._settle(lane, stage, _replica_url(replica))
        return reply.data

    def _settle(self, lane: _Lane, stage: StageClient, replica: str) -> None:
        """The lane's caches are at this replica now; what it left behind at another is freed."""
        left = lane.home[stage.index]
        lane.route[stage.index] = lane.home[stage.index] = replica
        if left == replica:
            return
        assert self._watch is not None
        self._watch.begin()
        self._kv.move(stage.index, left, replica, lane.kv_tokens)
        if not self._kv.known(stage.index, replica):
            self._spawn(self._ask(stage, replica))
        if left is not None:
            log.info("replica_changed", lane=lane.name, stage=stage.index, old=left, new=replica)
            self._kv.forget(stage.index, left)
            self._spawn(self._release_at(stage, left, list(lane.jobs)))

    def _deliver(self, lane: _Lane, booked: list[tuple[lanes.Sequence, Token]]) -> None:
        for sequence, token in booked:
            if not sequence.cancelled:
                lane.jobs[sequence.id].out.put_nowait(token)
            if token.finish is not None:
                sequence.cancelled = True  # swept before the next step
        metrics.TOKENS.inc(len(booked))

    # -- when a step fails

    async def _recover(self, lane: _Lane, flight: Flight) -> None:
        """Decides what becomes of the sequences of a step that has failed. Nothing of the lane is on its way."""
        jobs, error = [lane.jobs[sequence.id] for sequence in flight.sequences], flight.error
        if isinstance(error, KvExhausted):
            await self._make_room(lane, jobs, error)
        elif isinstance(error, StageUnreachable) or (isinstance(error, StageError) and error.retriable):
            await self._retry(lane, jobs, error)
        elif isinstance(error, StageError):
            _blame(lane, jobs, GenerationError(f"a stage failed: {error}", status=500, code=error.code))
        else:
            log.error("lane_failed", lane=lane.name, exc_info=error)
            _blame(lane, jobs, _internal(error))

    def _rewind(self, lane: _Lane, error: WrongPosition) -> None:
        """A stage holds less than was thought (a new replica holds nothing): that part is sent again."""
        for sequence, position in error.positions.items():
            if sequence in lane.jobs:
                metrics.REPLAYS.inc()
                lane.jobs[sequence].sequence.take_back(position)

    async def _retry(self, lane: _Lane, jobs: list[_Job], error: Exception) -> None:
        """Lets the step be tried again, some time later if it is not the first failure; gives up in the end: after so
        many attempts, or after the time that a stage may take to wake, whichever is first.

        A repeated step is harmless: stages compute it anew from where it starts."""
        for job in jobs:
            job.sequence.failures += 1
        worst = max(job.sequence.failures for job in jobs)
        log.warning("step_failed", error=str(error), attempt=worst, sequences=len(jobs))
        late = _now_s() - lane.progress_s >= self.settings.wake_timeout_s
        tired = [job for job in jobs if late or job.sequence.failures >= self.settings.attempts]
        _fail(tired, _given_up(error))
        if not isinstance(error, WrongPosition):
            await asyncio.sleep(self.settings.backoff_s * 2 ** min(worst - 1, 6))

    async def _make_room(self, lane: _Lane, jobs: list[_Job], error: KvExhausted) -> None:
        """A replica has less memory than it was thought to have. The sequence that came last to the lane, of a batch if
        there is one, waits until another has ended, and is then computed anew; only one that has everything to itself
        can fail of this."""
        if sum(len(other.jobs) for other in self._lanes) == 1:
            await self._retry(lane, jobs, error)
            return
        latest = [job for job in reversed(lane.jobs.values()) if job in jobs]
        job = next((job for job in latest if job.sequence.is_batch), latest[0])
        log.warning("sequence_put_back", lane=lane.name, error=str(error))
        del lane.jobs[job.sequence.id]
        lane.suspects = [suspect for suspect in lane.suspects if suspect is not job]
        self._let_go(lane, [job])
        if not job.sequence.cancelled:
            # under another id, so that the release of what it held cannot meet what it holds next
            job.sequence.id = _new_id()
            job.sequence.take_back(0)
            self._waiting[job.priority].appendleft(job)
        await asyncio.sleep(self.settings.backoff_s)

    # -- leaving the stages

    def _let_go(self, lane: _Lane, jobs: list[_Job]) -> None:
        """Frees the KV of sequences that have left the lane. Memory counts as free only once the stages have freed it:
        others would find them full."""
        ids, tokens, caches = [job.sequence.id for job in jobs], sum(job.kv_tokens for job in jobs), lane.caches

        async def release() -> None:
            try:
                await self._release(ids, caches)
            finally:
                self._kv.free(caches.home, tokens)
                self._fill_lanes()

        self._spawn(release())

    async def _release(self, sequences: list[int], caches: _Caches) -> None:
        """A stage that was never asked holds nothing, and asking it might wake it."""
        places = zip(self._stages, caches.home, caches.asked, strict=True)
        await asyncio.gather(*(self._release_at(stage, url, sequences) for stage, url, asked in places if asked))

    async def _release_at(self, stage: StageClient, url: str | None, sequences: list[int]) -> None:
        """One that cannot be reached is most likely gone with all it had."""
        try:
            await stage.release(encode_release(sequences), url, self.settings.release_timeout_s)
        except (StageUnreachable, StageError) as error:
            log.info("release_failed", stage=stage.index, sequences=len(sequences), error=str(error))

    # -- waking

    def _wake_all(self) -> None:
        """All stages at once: after some idle time they may all be at zero, and one after another would take long.
        A lane's first step to a stage waits for that stage's wake, so that a cold stage is asked by one event and not
        by one a lane, which would start more replicas than are needed."""
        for stage in self._stages:
            if stage.index not in self._wakes:
                self._wakes[stage.index] = asyncio.create_task(self._refresh(stage))

    async def _refresh(self, stage: StageClient) -> None:
        try:
            info = await stage.wake(self.settings.wake_timeout_s)
            infos = [info if old.stage == info.stage else old for old in self.infos]
            _check_chain(infos)
            self.infos = tuple(infos)
            self._learn(info)
            self._kv.resize(info.stage, _replica_url(info.replica))
            self._fill_lanes()
        except (StageUnreachable, StageError, GenerationError) as error:
            log.warning("wake_failed", stage=stage.index, error=str(error))
        finally:
            self._wakes.pop(stage.index, None)

    async def _ask(self, stage: StageClient, replica: str) -> None:
        """Learns the memory of a replica that a step has found."""
        try:
            self._learn(await stage.wake(self.settings.release_timeout_s, replica))
        except (StageUnreachable, StageError) as error:
            log.info("replica_not_asked", stage=stage.index, replica=replica, error=str(error))

    def _learn(self, info: StageInfo) -> None:
        total = info.kv_bytes_max // max(1, info.kv_bytes_per_token)
        self._kv.learn(info.stage, _replica_url(info.replica), info.kv_tokens_free, total)

    def _replicas(self) -> set[str]:
        return {url for lane in self._lanes for url in lane.route if url is not None}

    # -- small things

    async def _wake(self, stage: StageClient) -> StageInfo:
        """Tries until the stage answers: its port may not be open yet."""
        deadline_s = asyncio.get_running_loop().time() + self.settings.wake_timeout_s
        while True:
            left_s = deadline_s - asyncio.get_running_loop().time()
            try:
                return await stage.wake(max(left_s, 0.1))
            except (StageUnreachable, StageError) as error:
                if isinstance(error, StageError) and not error.retriable:
                    raise GenerationError(f"stage {stage.index}: {error}", status=503, code=error.code) from None
                # not there yet, a replica that is about to end, or an event that was damaged on the way
                if left_s <= 0:
                    raise GenerationError(str(error), status=503, code="stage_unavailable") from None
                await asyncio.sleep(self.settings.backoff_s)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _new_id() -> int:
    return secrets.randbelow(SEQUENCE_ID_BOUND - 1) + 1


def _replica_url(replica: str) -> str:
    """HOST:PORT, as replies name it, as a URL."""
    return f"http://{replica}/"


def _internal(error: Exception | None) -> GenerationError:
    return GenerationError(f"internal error ({type(error).__name__})", status=500, code="internal")


def _fail(jobs: Iterable[_Job], error: GenerationError) -> None:
    for job in jobs:
        job.sequence.cancelled = True
        job.out.put_nowait(error)


def _blame(lane: _Lane, jobs: list[_Job], error: GenerationError) -> None:
    """A step failed in a way that another try will not heal. Its sequences go on one at a time, so that only the one
    whose step fails again fails."""
    if len(jobs) == 1:
        _fail(jobs, error)
    else:
        lane.suspects = list(jobs)


def _given_up(error: Exception) -> GenerationError:
    if isinstance(error, StageError):
        status = error.status if error.status in (429, 503) else 503
        return GenerationError(f"a stage cannot go on: {error}", status=status, code=error.code, retry_after_s=5)
    return GenerationError(f"a stage cannot be reached: {error}", status=503, code="stage_unavailable", retry_after_s=5)


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
