"""A step's way through the stages: one event to each, in their order, and what is done where a stage does not answer.

A lane's first event to a stage goes to the stage's service, which chooses a replica (and starts one where there is
none); the reply names it, and from then on the lane goes there, where its caches are.

A stage that fails is asked again, by its service, with the body at hand: what the stages before it have computed is not
lost. If another replica answers, it lacks what the lost one held. The journal has it (the first stage needs only
tokens), so this replica alone is sent it again, and then the step. Only what the journal lacks goes back to the lane,
which replays it through the whole chain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import structlog

from functions.contract.errors import InvalidEvent, KvExhausted, NotReady, StageError, WrongPosition
from functions.contract.frames import Buffer
from functions.contract.messages import Sampled, Samples
from orchestrator import chain_metrics as metrics
from orchestrator.deadlines import Deadlines
from orchestrator.journal import Journal
from orchestrator.refill import Gap, refill_steps
from orchestrator.running import Lane
from orchestrator.stage_client import StageClient, StageSilent, StageUnreachable
from orchestrator.stage_pool import StagePool, replica_url
from orchestrator.window import Flight

log = structlog.get_logger()


@dataclass(slots=True)
class _Trouble:
    """What has gone wrong so far with a step at one stage."""

    failures: int = 0  # that count: after some of them the step is given up
    silences: int = 0  # times that the service gave no reply within the limit
    hung: set[str] = field(default_factory=set)  # replicas that gave no reply in time
    lacking: Mapping[int, int] = field(default_factory=dict)  # tokens that the replica has of sequences, where too few


class Hops:
    def __init__(self, pool: StagePool, journal: Journal, deadlines: Deadlines) -> None:
        self._pool = pool
        self._journal = journal
        self._deadlines = deadlines

    async def through(self, lane: Lane, flight: Flight) -> Sequence[Sampled] | None:
        """One step through all stages; None if it was stopped. The bytes between stages are relayed unopened."""
        body: Buffer = b"".join(flight.step.to_body())
        page = self._journal.open(flight.step.slices)
        with metrics.STEP_SECONDS.time():
            for stage in self._pool.clients:
                if page is not None and stage.index > 0:
                    self._journal.keep(page, stage.index, body)
                async with lane.doors[stage.index]:
                    if lane.window.stops(flight):
                        return None
                    body = await self._answer(lane, stage, flight, body)
                    flight.passed += 1
                lane.news.set()
        metrics.JOURNAL_BYTES.set(self._journal.bytes)
        try:
            return Samples.from_body(body).items
        except InvalidEvent as error:  # not ours but the last stage's
            raise StageUnreachable(f"the last stage answered no samples: {error}") from None

    def forget(self, sequences: Sequence[int]) -> None:
        """They have left the lane."""
        self._journal.forget(sequences)
        metrics.JOURNAL_BYTES.set(self._journal.bytes)

    async def _answer(self, lane: Lane, stage: StageClient, flight: Flight, body: Buffer) -> Buffer:
        """The stage's reply to the step, whatever that takes. Raises the last error where there is no use in trying on,
        and WrongPosition for what a replica lacks and cannot be given here."""
        trouble: _Trouble | None = None
        while True:
            asked = lane.route[stage.index]
            try:
                lost = await self._refill(lane, stage, flight, trouble) if trouble and trouble.lacking else {}
                if not lost:
                    reply = await self._hop(lane, stage, body, len(flight.step.tokens), trouble)
                    self._judge(lane, stage, trouble)
                    return reply
            except (StageUnreachable, StageError) as error:
                if isinstance(error, KvExhausted) or (isinstance(error, StageError) and not error.retriable):
                    raise
                trouble = trouble or _Trouble()
                await self._next_try(lane, stage, flight, trouble, asked, error)
                continue
            raise WrongPosition(f"{len(lost)} sequences have to be replayed through all stages", lost)

    async def _hop(
        self, lane: Lane, stage: StageClient, body: Buffer, tokens: int, trouble: _Trouble | None = None
    ) -> Buffer:
        """One event to the stage and its reply."""
        await self._pool.woken(stage)
        url, timeout_s = lane.route[stage.index], self._limit_s(lane, stage, tokens, trouble)
        lane.asked[stage.index] = True
        started_s = _now_s()
        try:
            with metrics.HOP_SECONDS.labels(stage.index).time(), self._deadlines.under_way(stage.index, tokens):
                reply = await stage.step(body, lane.name, url, timeout_s)
        except (StageUnreachable, NotReady):
            lane.route[stage.index] = None  # the next try asks the service for a replica
            raise
        except KvExhausted:
            if url is not None:
                self._pool.kv.full(stage.index, url)
            raise
        except WrongPosition as error:
            self.settle(lane, stage, error.replica)  # it is this one that is given what it lacks
            raise
        metrics.HOP_BYTES.labels(stage.index).inc(len(body))
        if url is not None:  # a service may have started a replica for it
            self._deadlines.observe(stage.index, tokens, _now_s() - started_s)
        self.settle(lane, stage, reply.extensions.get("replica"))
        return reply.data

    def _limit_s(self, lane: Lane, stage: StageClient, tokens: int, trouble: _Trouble | None) -> float:
        """Seconds that the next hop may take. A service may hold it until there is a replica, or give it to one that
        hangs, and nobody can tell which: it is asked again and again, with more and more patience."""
        settings = self._pool.settings
        limit_s = self._deadlines.limit_s(stage.index, tokens, _now_s(), settings.hang_floor_s, settings.step_timeout_s)
        if lane.route[stage.index] is not None:
            return limit_s
        most_s = max(settings.step_timeout_s, settings.wake_timeout_s - (_now_s() - lane.progress_s))
        return min(most_s, limit_s * 2.0 ** min(trouble.silences if trouble else 0, 30))

    def settle(self, lane: Lane, stage: StageClient, replica: str | None) -> None:
        """The lane's caches are at this replica (HOST:PORT) now; what it left behind at another is freed."""
        if not replica or not stage.url.startswith("http://"):
            return  # behind TLS a replica has no address that a client could use
        url, left = replica_url(replica), lane.home[stage.index]
        lane.route[stage.index] = lane.home[stage.index] = url
        if left == url:
            return
        self._pool.kv.move(stage.index, left, url, lane.kv_tokens)
        self._pool.taken(stage, url)
        if left is not None:
            log.info("replica_changed", lane=lane.name, stage=stage.index, old=left, new=url)
            self._pool.kv.forget(stage.index, left)
            self._pool.spawn(self._pool.release_at(stage, left, list(lane.jobs)))

    # -- when a stage does not answer

    async def _next_try(
        self,
        lane: Lane,
        stage: StageClient,
        flight: Flight,
        trouble: _Trouble,
        asked: str | None,
        error: StageUnreachable | StageError,
    ) -> None:
        """Returns when the stage may be asked again. Raises the error if it is not to be: nobody waits for the step any
        more, or it has had so many attempts, or as long as a stage may take to wake. `asked` is the replica that
        failed, None for the service."""
        settings, pause_s = self._pool.settings, 0.0
        trouble.lacking = error.positions if isinstance(error, WrongPosition) else {}
        if isinstance(error, StageSilent) and asked is not None:
            self._alarm(lane, stage, trouble, asked)
        elif isinstance(error, StageSilent):
            trouble.silences += 1
        elif asked is None or lane.route[stage.index] is not None:  # else the service has yet to be asked
            trouble.failures += 1
            if not trouble.lacking:
                pause_s = settings.backoff_s * 2 ** min(trouble.failures - 1, 6)
        log.warning("hop_failed", lane=lane.name, stage=stage.index, error=str(error), attempt=trouble.failures)
        late = _now_s() - lane.progress_s >= settings.wake_timeout_s
        if late or trouble.failures >= settings.attempts:
            for sequence in flight.sequences:
                sequence.failures = settings.attempts  # the lane gives them no more
            raise error
        await asyncio.sleep(pause_s)
        if lane.window.stops(flight) or all(sequence.cancelled for sequence in flight.sequences):
            raise error

    def _alarm(self, lane: Lane, stage: StageClient, trouble: _Trouble, replica: str) -> None:
        """The replica hangs, it seems. A replica that others use is better than the service, which may lead back."""
        trouble.hung.add(replica)
        self._deadlines.alarm(stage.index, _now_s())
        metrics.HANGS.labels(stage.index).inc()
        others = trouble.hung | self._pool.draining
        lane.route[stage.index] = self._pool.kv.another(stage.index, lane.kv_tokens, others)

    def _judge(self, lane: Lane, stage: StageClient, trouble: _Trouble | None) -> None:
        """Whether alarms were false, once the step has been answered."""
        if trouble is not None and trouble.hung and lane.home[stage.index] not in trouble.hung:
            self._deadlines.confirm(stage.index, _now_s())

    async def _refill(self, lane: Lane, stage: StageClient, flight: Flight, trouble: _Trouble) -> dict[int, int]:
        """Sends the stage what it lacks of the step's sequences. Returns what it has of those that it cannot be sent
        again, because the journal has dropped them."""
        gaps, lost = [], {}
        for sequence, piece in zip(flight.sequences, flight.step.slices, strict=True):
            position = trouble.lacking.get(piece.sequence)
            if position is None or not 0 <= position < piece.start:
                continue  # it lacks nothing, or does not know what it says
            hidden = None
            if stage.index > 0:
                hidden = self._journal.rows(stage.index, piece.sequence, position, piece.start)
                if hidden is None:
                    lost[piece.sequence] = position
                    continue
            gaps.append(Gap(sequence, position, piece.start, hidden))
        for step in refill_steps(gaps, self._pool.settings.step_tokens_max):
            await self._hop(lane, stage, b"".join(step.to_body()), len(step.tokens), trouble)
            metrics.REFILL_TOKENS.labels(stage.index).inc(len(step.tokens))
        log.info("refilled", lane=lane.name, stage=stage.index, sequences=len(gaps), lost=len(lost))
        return lost


def _now_s() -> float:
    return asyncio.get_running_loop().time()
