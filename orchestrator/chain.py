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
import time
from collections import deque
from collections.abc import AsyncIterator, Coroutine, Iterable, Sequence
from typing import Any, get_args

import structlog

from functions.contract.errors import KvExhausted, StageError, WrongPosition
from functions.contract.messages import KV_PAGE_TOKENS, SEQUENCE_ID_BOUND, StageInfo
from functions.contract.seals import Seals
from orchestrator import chain_metrics as metrics
from orchestrator import lanes
from orchestrator.chain_settings import ChainSettings as ChainSettings  # part of this module's surface
from orchestrator.deadlines import Deadlines
from orchestrator.generation import (
    GenerationError,
    GenerationRequest,
    Priority,
    Token,
    past_deadline,
    shutting_down,
)
from orchestrator.handover import Handover
from orchestrator.hops import Hops
from orchestrator.journal import Journal
from orchestrator.pace import Pace, retry_after_s
from orchestrator.running import Job, Lane
from orchestrator.stage_client import StageUnreachable
from orchestrator.stage_pool import StagePool
from orchestrator.step_times import StepTimes
from orchestrator.window import Flight, Window

log = structlog.get_logger()

_CLOSE_TIMEOUT_S = 2.0
_CLEARLY = 2.0  # so many times more than there is: an estimate is only one


class Chain:
    """Implements `orchestrator.generation.Generator` over stages that run elsewhere."""

    def __init__(
        self,
        plan_digest: str,
        stage_urls: Sequence[str],
        settings: ChainSettings | None = None,
        seals: Seals | None = None,
        step_times: Sequence[StepTimes] = (),
    ) -> None:
        """`step_times`: of each stage, as far as they were measured before."""
        self._pool = StagePool(
            plan_digest, stage_urls, settings or ChainSettings(), seals or Seals(), in_use=self._replicas,
            held=self._held, changed=self._fill_lanes,
        )  # fmt: skip
        journal = Journal(len(self._pool), self.settings.journal_bytes_max)
        self._hops = Hops(self._pool, journal, Deadlines(len(self._pool), step_times))
        self._handover = Handover(self._pool, self._hops.settle, self._start)
        self._lanes: list[Lane] = []
        self._waiting: dict[Priority, deque[Job]] = {priority: deque() for priority in get_args(Priority)}
        self._interactive = 0  # sequences, waiting and running
        self._interactive_s = -math.inf  # when the last of them left
        self._tasks: set[asyncio.Task[None]] = set()  # lanes, and their steps on the way
        self._active_s = 0.0  # when the last lane ended
        self._pace = Pace()
        self._stopped = False

    # -- what endpoints use

    @property
    def settings(self) -> ChainSettings:
        return self._pool.settings

    @settings.setter
    def settings(self, settings: ChainSettings) -> None:
        self._pool.settings = settings

    @property
    def infos(self) -> tuple[StageInfo, ...]:
        """What the stages said when they woke last; empty unless `ready`."""
        return self._pool.infos

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
        await self._pool.open()
        self._active_s = _now_s()

    async def close(self) -> None:
        """Ends the lanes; sequences on their way end with an error."""
        await self._pool.close_wakes()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        jobs = [job for line in self._waiting.values() for job in line]
        jobs += [job for lane in self._lanes for job in lane.jobs.values()]
        for line in self._waiting.values():
            line.clear()
        for lane in self._lanes:
            self._pool.spawn(self._pool.release(list(lane.jobs), lane.caches))
            self._hops.forget(list(lane.jobs))
            metrics.RUNNING.labels(lane.name).set(0)
        self._lanes.clear()
        await self._pool.close(_CLOSE_TIMEOUT_S)
        _fail(jobs, shutting_down())

    def stop(self) -> None:
        """Ends whatever runs or waits with an error, and takes nothing in any more; to be closed soon."""
        self._stopped = True
        jobs = [job for line in self._waiting.values() for job in line]
        jobs += [job for lane in self._lanes for job in lane.jobs.values()]
        for line in self._waiting.values():
            line.clear()  # at once: nobody moves up
        self._end_early(jobs, shutting_down())

    def ahead_s(self) -> float | None:
        """How long the work that is here now will take, running and waiting, by what is measured of late; None if
        nothing is known yet."""
        jobs = [job for line in self._waiting.values() for job in line]
        return self._takes_s([*jobs, *(job for lane in self._lanes for job in lane.jobs.values())])

    async def generate(self, request: GenerationRequest) -> AsyncIterator[Token]:
        """See `Generator.generate`."""
        job = self._admit(request)
        deadline = None
        if request.deadline_s is not None:
            left_s = request.deadline_s - time.monotonic()
            loop = asyncio.get_running_loop()
            deadline = loop.call_later(max(left_s, 0), self._end_early, [job], past_deadline())
        finish = None
        try:
            while finish is None:
                item = await job.next()
                if isinstance(item, GenerationError):
                    raise item
                finish = item.finish
                yield item
        finally:
            if deadline is not None:
                deadline.cancel()
            self._drop(job)

    # -- admission

    def _admit(self, request: GenerationRequest) -> Job:
        if self._stopped:
            raise shutting_down()
        if not self.ready:
            raise GenerationError("the stages are not ready yet", status=503, code="not_ready", retry_after_s=1)
        self._check(request)
        if request.deadline_s is not None and request.deadline_s <= time.monotonic():
            raise past_deadline()
        line = self._waiting[request.priority]
        self._check_line(line, request)
        tokens = len(request.prompt) + request.max_tokens
        sequence = lanes.Sequence(_new_id(), request)
        job = Job(sequence, -(-tokens // KV_PAGE_TOKENS) * KV_PAGE_TOKENS)
        if job.kv_tokens > self._pool.kv.largest:
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

    def _check_line(self, line: deque[Job], request: GenerationRequest) -> None:
        """Raises GenerationError (429) where the line is full, or so long that the request's time would be over before
        its turn."""
        if not line:
            return
        prompts = sum(len(job.sequence.request.prompt) for job in line)
        if len(line) >= self.settings.waiting_max or prompts + len(request.prompt) > self.settings.waiting_tokens_max:
            raise GenerationError(
                f"{len(line)} requests are waiting, with {prompts} tokens of prompts, which is the limit; try again "
                "later",
                status=429,
                code="overloaded",
                retry_after_s=retry_after_s(self.ahead_s()),
            )
        wait_s = self._takes_s(line)
        if request.deadline_s is None or wait_s is None:
            return
        left_s = request.deadline_s - time.monotonic()
        if wait_s > _CLEARLY * left_s:
            raise GenerationError(
                f"the request leaves {max(left_s, 0):.1f} s, and it would have to wait for about {wait_s:.0f} s before "
                "its turn; give it more time, or try again later",
                status=429,
                code="deadline_too_soon",
                retry_after_s=retry_after_s(wait_s),
            )

    def _takes_s(self, jobs: Iterable[Job]) -> float | None:
        """How long the work of these will take, if that is known."""
        prompts = answers = 0
        for job in jobs:
            prompts += len(job.sequence.history) - job.sequence.cached
            answers += job.sequence.request.max_tokens - job.sequence.generated
        return self._pace.takes_s(prompts, answers)

    def _fill_lanes(self) -> None:
        """Moves waiting sequences into lanes while there is room and KV memory: interactive ones, and once none of them
        waits those of batches. Within a line first come, first served."""
        for line in self._waiting.values():
            if not self.ready or not self._let_in(line):
                break
        for priority, line in self._waiting.items():
            metrics.WAITING.labels(priority).set(len(line))

    def _let_in(self, line: deque[Job]) -> bool:
        """Whether nobody is left in the line."""
        while line:
            lane = self._place(line[0])
            if lane is None:
                return False
            job = line.popleft()
            self._pool.kv.promise(lane.home, job.kv_tokens)
            job.sequence.key = lane.key
            lane.jobs[job.sequence.id] = job
            job.news = lane.news
            lane.news.set()
        return True

    def _place(self, job: Job) -> Lane | None:
        now_s = _now_s()
        share = self._share_of(job, now_s)
        states = [
            lanes.LaneState(
                len(lane.jobs),
                now_s - lane.opened_s,
                self._pool.kv.fits(lane.home, job.kv_tokens, share) and not self._handover.avoids(lane),
            )
            for lane in self._lanes
        ]
        rule = self._rule(share)
        index = lanes.place(states, rule, may_open=self._pool.kv.fits([None] * len(self._pool), job.kv_tokens, share))
        if index is None:
            return None
        return self._lanes[index] if index < len(self._lanes) else self._open_lane(now_s)

    def _share_of(self, job: Job, now_s: float) -> float:
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
        return self.settings.spread or len(self._pool)

    def _drop(self, job: Job) -> None:
        """The consumer is gone: a waiting sequence leaves at once, a running one before the lane's next step."""
        if job.dropped:
            return
        job.dropped = job.sequence.cancelled = True
        if job.news is not None:
            job.news.set()  # a lane whose sequences all pause waits for nothing else
        if job.priority == "interactive":
            self._interactive -= 1
            self._interactive_s = _now_s()
        line = self._waiting[job.priority]
        if job in line:
            line.remove(job)
            self._fill_lanes()  # others may have waited for it alone

    def _end_early(self, jobs: Iterable[Job], error: GenerationError) -> None:
        """Whoever reads them gets an error next, and nobody works on them any more."""
        for job in [job for job in jobs if not job.sequence.cancelled]:
            self._drop(job)
            job.out.put_nowait(error)

    # -- lanes

    def _open_lane(self, now_s: float) -> Lane:
        if not self._lanes and now_s - self._active_s >= self.settings.idle_before_wake_s:
            self._pool.wake_all()
        used, count = {lane.slot for lane in self._lanes}, len(self._pool)
        slot = next(slot for slot in itertools.count() if slot not in used)
        lane = Lane(
            slot, now_s, now_s, route=[None] * count, home=[None] * count, asked=[False] * count,
            doors=[asyncio.Lock() for _ in range(count)], window=Window(self._spread),
        )  # fmt: skip
        self._lanes.append(lane)
        self._pace.begin(now_s)
        self._start(self._run_lane(lane))
        return lane

    async def _run_lane(self, lane: Lane) -> None:
        try:
            self._sweep(lane)
            while lane.jobs:
                sent = self._send(lane)
                self._hand_out(lane)
                if not sent:
                    await lane.news.wait()
                    lane.news.clear()
                await self._take_in(lane)
                self._sweep(lane)
            self._hand_out(lane)
        except Exception as error:  # a mistake of ours must not leave anybody waiting
            log.exception("lane_failed", lane=lane.name)
            self._hand_out(lane)
            _fail(lane.jobs.values(), _internal(error))
        self._lanes.remove(lane)  # not when cancelled: `close` looks after what is left
        self._active_s = _now_s()
        if not self._lanes:
            self._pace.rest()

    def _sweep(self, lane: Lane) -> None:
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

    def _send(self, lane: Lane) -> bool:
        """Sends the lane's next step on its way, if there is one to be sent now. True if anything has changed."""
        if not lane.window.takes_more or not self._handover.lane_may_go(lane) or (lane.suspects and lane.window):
            return False
        awake = lane.suspects[:1] or [job for job in lane.jobs.values() if not job.paused]
        going = [job for job in awake if not job.sequence.cancelled]
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

    async def _fly(self, lane: Lane, flight: Flight) -> None:
        """Takes a step through the stages. Whatever comes of it is left in the flight, for the lane to find."""
        try:
            flight.samples = await self._hops.through(lane, flight)
            self._pace.worked(len(flight.step.tokens), _now_s())
        except Exception as error:  # also a mistake of ours, which must not leave anybody waiting
            flight.error = error
        flight.ended = True
        lane.news.set()

    async def _take_in(self, lane: Lane) -> None:
        """Books what has come back. After a failure, once nothing is on its way: what follows from it."""
        while (tokens := lane.window.book()) is not None:
            lane.suspects = lane.suspects[1:]
            lane.progress_s = _now_s()
            self._book(lane, tokens)
        failed = lane.window.clear()
        if failed:
            self._hand_out(lane)
            for flight in failed:
                if isinstance(flight.error, WrongPosition):
                    self._rewind(lane, flight.error)
            await self._recover(lane, failed[0])

    def _book(self, lane: Lane, tokens: list[tuple[lanes.Sequence, Token]]) -> None:
        for sequence, token in tokens:
            if not sequence.cancelled:
                job = lane.jobs[sequence.id]
                job.booked += 1
                lane.booked.append((job, token))
            if token.finish is not None:
                sequence.cancelled = True  # swept before the next step
                self._pace.ended(sequence.generated, sequence.request.max_tokens)
        metrics.TOKENS.inc(len(tokens))

    @staticmethod
    def _hand_out(lane: Lane) -> None:
        """Gives booked tokens to whoever waits for them. The lane's next step, if there is one, has its turn before
        all of them: what they do with their tokens takes as long as some hops, and need not hold it up."""
        for job, token in lane.booked:
            job.booked -= 1
            job.out.put_nowait(token)
        lane.booked.clear()

    # -- when a step fails

    async def _recover(self, lane: Lane, flight: Flight) -> None:
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

    def _rewind(self, lane: Lane, error: WrongPosition) -> None:
        """A stage holds less than was thought (a new replica holds nothing): that part is sent again."""
        for sequence, position in error.positions.items():
            if sequence in lane.jobs:
                metrics.REPLAYS.inc()
                lane.jobs[sequence].sequence.take_back(position)

    async def _retry(self, lane: Lane, jobs: list[Job], error: Exception) -> None:
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
        if not isinstance(error, WrongPosition) and not all(job.sequence.cancelled for job in jobs):
            await asyncio.sleep(self.settings.backoff_s * 2 ** min(worst - 1, 6))

    async def _make_room(self, lane: Lane, jobs: list[Job], error: KvExhausted) -> None:
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

    def _let_go(self, lane: Lane, jobs: list[Job]) -> None:
        """Frees the KV of sequences that have left the lane. Memory counts as free only once the stages have freed it:
        others would find them full."""
        ids, tokens, caches = [job.sequence.id for job in jobs], sum(job.kv_tokens for job in jobs), lane.caches
        self._hops.forget(ids)

        async def release() -> None:
            try:
                await self._pool.release(ids, caches)
            finally:
                self._pool.kv.free(caches.home, tokens)
                self._fill_lanes()

        self._pool.spawn(release())

    def _replicas(self) -> set[str]:
        return {url for lane in self._lanes for url in lane.route if url is not None}

    def _held(self) -> dict[tuple[int, str], list[int]]:
        """The sequences at each stage's replicas."""
        held: dict[tuple[int, str], list[int]] = {}
        for lane in self._lanes:
            for stage, url in enumerate(lane.home):
                if url is not None and lane.jobs:
                    held.setdefault((stage, url), []).extend(lane.jobs)
        return held

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _new_id() -> int:
    return secrets.randbelow(SEQUENCE_ID_BOUND - 1) + 1


def _internal(error: Exception | None) -> GenerationError:
    return GenerationError(f"internal error ({type(error).__name__})", status=500, code="internal")


def _fail(jobs: Iterable[Job], error: GenerationError) -> None:
    for job in jobs:
        job.sequence.cancelled = True
        job.out.put_nowait(error)


def _blame(lane: Lane, jobs: list[Job], error: GenerationError) -> None:
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
