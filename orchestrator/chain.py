"""The chain of stages as one generator of tokens: admission, lanes, recovery, release.

Each lane is a task that sends its step through all stages, one after another, books the answer and starts over. With
as many lanes as stages the pipeline is full: while lane 0 is in stage 1, lane 1 is in stage 0.

    generate() -> waiting line -> lane -> step: stage 0 -> stage 1 -> ... -> samples -> generate() yields tokens
"""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import structlog

from functions.contract.errors import InvalidEvent, NotReady, StageError, WrongPosition
from functions.contract.frames import Buffer
from functions.contract.messages import SEQUENCE_ID_BOUND, Samples, StageInfo, Step, encode_release
from orchestrator import chain_metrics as metrics
from orchestrator import lanes
from orchestrator.generation import GenerationError, GenerationRequest, Token
from orchestrator.stage_client import StageClient, StageUnreachable

log = structlog.get_logger()

# stages set memory aside by eighths and at least this many tokens, see functions/kv_cache.py
_KV_SLACK_TOKENS = 16
_CLOSE_TIMEOUT_S = 2.0


@dataclass(frozen=True, slots=True)
class ChainSettings:
    lanes: int = 0  # 0: as many as there are stages
    lane_width: int = 64  # sequences
    step_tokens_max: int = 512  # prefill chunks and decode tokens of one step
    waiting_max: int = 1024  # sequences admitted but not yet in a lane
    wake_timeout_s: float = 600.0
    step_timeout_s: float = 120.0
    release_timeout_s: float = 10.0
    attempts: int = 6  # steps in a row without progress before a sequence fails
    backoff_s: float = 0.1  # doubled with each attempt


@dataclass(eq=False)
class _Job:
    """A sequence in the chain, with the line its tokens leave by."""

    sequence: lanes.Sequence
    kv_tokens: int
    out: asyncio.Queue[Token | GenerationError] = field(default_factory=asyncio.Queue)


@dataclass(eq=False)
class _Lane:
    name: str
    jobs: list[_Job] = field(default_factory=list)
    route: list[str | None] = field(default_factory=list)  # replica per stage, None: ask the service
    filled: asyncio.Event = field(default_factory=asyncio.Event)
    suspects: list[_Job] = field(default_factory=list)  # one of them broke a step: they go on one at a time


class Chain:
    """Implements `orchestrator.generation.Generator` over stages that run elsewhere."""

    def __init__(self, plan_digest: str, stage_urls: Sequence[str], settings: ChainSettings | None = None) -> None:
        self.settings = settings or ChainSettings()
        self.infos: tuple[StageInfo, ...] = ()
        self._plan = plan_digest
        self._urls = tuple(url.rstrip("/") + "/" for url in stage_urls)
        self._stages: list[StageClient] = []
        self._lanes: list[_Lane] = []
        self._waiting: deque[_Job] = deque()
        self._kv_tokens_max = self._kv_tokens_free = 0
        self._lane_tasks: list[asyncio.Task[None]] = []
        self._releases: set[asyncio.Task[None]] = set()
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
        """Wakes all stages at once and opens the lanes. Raises GenerationError if they do not fit together, or if one
        does not answer in time."""
        self._session = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=300))
        self._stages = [StageClient(self._session, i, url, self._plan) for i, url in enumerate(self._urls)]
        infos = await asyncio.gather(*(self._wake(stage) for stage in self._stages))
        _check_chain(infos)
        # what an orchestrator before this one left behind is not free, and nobody will free it
        self._kv_tokens_max = self._kv_tokens_free = min(info.kv_tokens_free for info in infos)
        count = self.settings.lanes or len(infos)
        self._lanes = [_Lane(str(index), route=[None] * len(infos)) for index in range(count)]
        self._lane_tasks = [asyncio.create_task(self._run_lane(lane)) for lane in self._lanes]
        self.infos = tuple(infos)

    async def close(self) -> None:
        """Ends the lanes; sequences on their way end with an error."""
        self.infos = ()
        for task in self._lane_tasks:
            task.cancel()
        await asyncio.gather(*self._lane_tasks, return_exceptions=True)
        for lane in self._lanes:
            if lane.jobs:
                self._spawn(self._release([job.sequence.id for job in lane.jobs], list(lane.route)))
        if self._releases:
            _, late = await asyncio.wait(self._releases, timeout=_CLOSE_TIMEOUT_S)
            for task in late:
                task.cancel()
        error = GenerationError("the server is shutting down", status=503, code="shutting_down")
        for job in [*self._waiting, *(job for lane in self._lanes for job in lane.jobs)]:
            job.out.put_nowait(error)
        self._waiting.clear()
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
        if len(self._waiting) >= self.settings.waiting_max:
            raise GenerationError(
                f"{len(self._waiting)} requests are waiting, which is the limit; try again later",
                status=429,
                code="overloaded",
                retry_after_s=5,
            )
        tokens = len(request.prompt) + request.max_tokens
        sequence = lanes.Sequence(secrets.randbelow(SEQUENCE_ID_BOUND - 1) + 1, request)
        job = _Job(sequence, tokens + max(_KV_SLACK_TOKENS, tokens // 8))
        if job.kv_tokens > self._kv_tokens_max:
            raise GenerationError(
                f"prompt and answer of {tokens} tokens do not fit into the KV memory of a stage; ask for less, or "
                "give the stages more",
                status=400,
                code="kv_memory_exceeded",
                param="max_tokens",
            )
        self._waiting.append(job)
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
        """Moves waiting sequences into lanes while there is room and KV memory. First come, first served."""
        while self._waiting and self._waiting[0].kv_tokens <= self._kv_tokens_free:
            index = lanes.least_loaded([len(lane.jobs) for lane in self._lanes], self.settings.lane_width)
            if index is None:
                break
            job = self._waiting.popleft()
            self._kv_tokens_free -= job.kv_tokens
            self._lanes[index].jobs.append(job)
            self._lanes[index].filled.set()
        metrics.WAITING.set(len(self._waiting))

    def _drop(self, job: _Job) -> None:
        """The consumer is gone: a waiting sequence leaves at once, a running one before the lane's next step."""
        job.sequence.cancelled = True
        if job in self._waiting:
            self._waiting.remove(job)
            metrics.WAITING.set(len(self._waiting))

    # -- lanes

    async def _run_lane(self, lane: _Lane) -> None:
        while True:
            self._sweep(lane)
            if not lane.jobs:
                lane.filled.clear()
                await lane.filled.wait()
                continue
            await self._step(lane)

    def _sweep(self, lane: _Lane) -> None:
        """Takes out sequences that have ended, frees their KV in every stage, and lets others in."""
        gone = [job for job in lane.jobs if job.sequence.cancelled]
        lane.suspects = [job for job in lane.suspects if not job.sequence.cancelled]
        if gone:
            lane.jobs = [job for job in lane.jobs if not job.sequence.cancelled]
            self._spawn(self._let_go(gone, list(lane.route)))
        self._fill_lanes()
        metrics.RUNNING.labels(lane.name).set(len(lane.jobs))

    async def _step(self, lane: _Lane) -> None:
        going = lane.suspects[:1] or lane.jobs
        in_step = going
        try:
            step = lanes.next_step([job.sequence for job in going], self.settings.step_tokens_max)
            jobs = {job.sequence.id: job for job in going}
            in_step = [jobs[piece.sequence] for piece in step.slices]
            samples = await self._pass(lane, step)
            booked = lanes.progress([job.sequence for job in in_step], step, samples.items)
        except WrongPosition as error:
            self._rewind(jobs, error)
            await self._retry(in_step, error)
        except StageUnreachable as error:
            await self._retry(in_step, error)
        except StageError as error:
            if error.retriable:
                await self._retry(in_step, error)
            else:
                _blame(lane, in_step, GenerationError(f"a stage failed: {error}", status=500, code=error.code))
        except Exception as error:  # a mistake of ours must not leave anybody waiting
            log.exception("lane_failed", lane=lane.name)
            _blame(
                lane, in_step, GenerationError(f"internal error ({type(error).__name__})", status=500, code="internal")
            )
        else:
            lane.suspects = lane.suspects[1:]
            self._deliver(jobs, booked)

    async def _pass(self, lane: _Lane, step: Step) -> Samples:
        """One step through all stages. The bytes between stages are relayed unopened."""
        body: Buffer = b"".join(step.to_body())
        with metrics.STEP_SECONDS.time():
            for stage in self._stages:
                body = await self._hop(lane, stage, body)
        try:
            return Samples.from_body(body)
        except InvalidEvent as error:  # not ours but the last stage's
            raise StageUnreachable(f"the last stage answered no samples: {error}") from None

    async def _hop(self, lane: _Lane, stage: StageClient, body: Buffer) -> Buffer:
        url = lane.route[stage.index]
        try:
            with metrics.HOP_SECONDS.labels(stage.index).time():
                reply = await stage.step(body, lane.name, url, self.settings.step_timeout_s)
        except (StageUnreachable, NotReady):
            lane.route[stage.index] = None  # the next try asks the service for a replica
            raise
        metrics.HOP_BYTES.labels(stage.index).inc(len(body))
        replica = reply.extensions.get("replica")
        if replica and stage.url.startswith("http://"):  # behind TLS a replica has no address that a client could use
            lane.route[stage.index] = f"http://{replica}/"
        return reply.data

    def _deliver(self, jobs: dict[int, _Job], booked: list[tuple[lanes.Sequence, Token]]) -> None:
        for sequence, token in booked:
            if not sequence.cancelled:
                jobs[sequence.id].out.put_nowait(token)
            if token.finish is not None:
                sequence.cancelled = True  # swept before the next step
        metrics.TOKENS.inc(len(booked))

    # -- when a step fails

    def _rewind(self, jobs: dict[int, _Job], error: WrongPosition) -> None:
        """A stage holds less than was thought (a new replica holds nothing): that part is sent again."""
        for sequence, position in error.positions.items():
            if sequence in jobs:
                metrics.REPLAYS.inc()
                jobs[sequence].sequence.take_back(position)

    async def _retry(self, jobs: list[_Job], error: Exception) -> None:
        """Lets the step be tried again, some time later if it is not the first failure; gives up in the end.

        A repeated step is harmless: stages compute it anew from where it starts."""
        for job in jobs:
            job.sequence.failures += 1
        worst = max(job.sequence.failures for job in jobs)
        log.warning("step_failed", error=str(error), attempt=worst, sequences=len(jobs))
        tired = [job for job in jobs if job.sequence.failures >= self.settings.attempts]
        _fail(tired, _given_up(error))
        if not isinstance(error, WrongPosition):
            await asyncio.sleep(self.settings.backoff_s * 2 ** min(worst - 1, 6))

    async def _let_go(self, jobs: list[_Job], route: list[str | None]) -> None:
        """Memory counts as free only once the stages have freed it: others would find them full."""
        await self._release([job.sequence.id for job in jobs], route)
        self._kv_tokens_free += sum(job.kv_tokens for job in jobs)
        self._fill_lanes()

    async def _release(self, sequences: list[int], route: list[str | None]) -> None:
        """Frees the sequences' KV in every stage. One that cannot be reached is most likely gone with all it had."""
        data = encode_release(sequences)
        calls = (
            stage.release(data, url, self.settings.release_timeout_s)
            for stage, url in zip(self._stages, route, strict=True)
        )
        for stage, result in zip(self._stages, await asyncio.gather(*calls, return_exceptions=True), strict=True):
            if isinstance(result, Exception):
                log.warning("release_failed", stage=stage.index, sequences=len(sequences), error=str(result))

    # -- small things

    async def _wake(self, stage: StageClient) -> StageInfo:
        """Tries until the stage answers: its port may not be open yet."""
        deadline_s = asyncio.get_running_loop().time() + self.settings.wake_timeout_s
        while True:
            left_s = deadline_s - asyncio.get_running_loop().time()
            try:
                return await stage.wake(max(left_s, 0.1))
            except StageUnreachable as error:
                if left_s <= 0:
                    raise GenerationError(str(error), status=503, code="stage_unavailable") from None
                await asyncio.sleep(self.settings.backoff_s)
            except StageError as error:
                raise GenerationError(f"stage {stage.index}: {error}", status=503, code=error.code) from None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._releases.add(task)
        task.add_done_callback(self._releases.discard)


def _fail(jobs: Sequence[_Job], error: GenerationError) -> None:
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
