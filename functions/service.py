"""A stage behind its events: loading in the background, one computation at a time, the event loop free meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import math
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar

import structlog
import torch

from functions import metrics
from functions.compute_thread import ComputeThread
from functions.contract import events
from functions.contract.checkpoint import CheckpointError, open_checkpoint
from functions.contract.errors import InvalidEvent, NotReady, PlanMismatch, StageError, StageFailure
from functions.contract.events import Event
from functions.contract.frames import Buffer
from functions.contract.handover import Adopt, Adopted, Export, Pieces
from functions.contract.location import checkpoint_location, wait_for_checkpoint
from functions.contract.messages import Samples, StageInfo, Step, decode_sequences
from functions.contract.scoring import RESULT, SCORE, SPENT_PATH
from functions.contract.seals import Seals
from functions.contract.settings_error import SettingsError
from functions.cores import Cores
from functions.handover import PIECES_BYTES_MAX, FetchFailed, adopt
from functions.kernels import processor
from functions.leases import Clock
from functions.runner import load_runner
from functions.score_events import Scorer
from functions.settings import StageSettings
from functions.stage import Outcome, Stage

log = structlog.get_logger()

T = TypeVar("T")

TAKEN_TYPES = (*events.REQUEST_TYPES, SCORE, RESULT)

_LOOKS_PER_LEASE = 4  # for sequences whose lease is over
_QUIET_S = 3.0  # so long after SIGTERM a stage waits for whoever holds sequences here; chains probe once a second
_QUICK_S = 0.003
_TOGETHER_TOKENS_MAX = 1024  # of several steps in one pass: more would make the short ones wait for the long


@dataclasses.dataclass(eq=False, slots=True)
class _Waiting:
    """A step on its way through the compute thread."""

    step: Step
    arrived_s: float
    gone: Callable[[], bool]  # whether its sender has left
    outcome: Outcome | None = None
    compute_s: float = 0.0


class _Quick:
    """Which steps are over so soon that the way to another thread and back would be felt, and are computed in the event
    loop's own: so many tokens as have taken less than three milliseconds before.

    Only with one thread: where two have torch's threads work for them, there are more of these than cores, and OpenMP
    puts them to sleep at once. And not where other processes may hold the cores: nobody may wait for them here."""

    def __init__(self, possible: bool) -> None:
        self._possible = possible
        self._tokens_max = 0

    def takes(self, step: Step) -> bool:
        return len(step.tokens) <= self._tokens_max

    def learn(self, tokens: int, compute_s: float) -> None:
        if self._possible and compute_s < _QUICK_S:
            self._tokens_max = max(self._tokens_max, tokens)
        else:
            self._tokens_max = min(self._tokens_max, tokens - 1)


class StageService:
    """Answers all events of a stage. `failure` is set when loading has failed for good."""

    def __init__(self, settings: StageSettings, seals: Seals | None = None, clock: Clock = time.monotonic) -> None:
        """`seals`: of what this stage asks other replicas."""
        self.settings = settings
        self.failure: str | None = None
        self._stage: Stage | None = None
        self._loading: Future[Stage] | None = None
        # one thread: the stage is not made for two, and torch uses the cores by itself
        self._compute = ComputeThread("compute")
        self._cores = _open_cores(settings.cores_lock)
        self._waiting: dict[_Waiting, None] = {}  # in the order in which they came
        self._quick = _Quick(possible=not settings.cores_lock and settings.torch_threads() == 1)
        self._scorer = Scorer(settings, self._computed)
        self._seals = seals or Seals()
        self._clock = clock
        self._expiry: asyncio.Task[None] | None = None  # while sequences are held
        self._leaving_s: float | None = None  # when the process was told to end
        self._probed_s = -math.inf

    def start(self) -> None:
        """Begins to load, once. Not done when built: a server may fork after that, and threads stay behind."""
        if self._loading is None:
            self._loading = Future()
            threading.Thread(target=self._load, args=(self._loading,), name="load", daemon=True).start()

    def stop(self) -> None:
        """The process is about to end: whoever waits for the weights is told so. Called by a signal's handler."""
        if self._leaving_s is None:
            self._leaving_s = self._clock()
        if self._loading is not None:
            _settle(self._loading, NotReady("the stage is shutting down"))

    @property
    def ready(self) -> bool:
        return self._stage is not None

    @property
    def leaving(self) -> bool:
        """Whether the process was told to end. It still answers, so that its sequences can go elsewhere."""
        return self._leaving_s is not None

    @property
    def left(self) -> bool:
        """Whether the process that was told to end may do so: no sequence is held, nobody cares for those that are, or
        the time for that is over."""
        if self._stage is None or self._leaving_s is None or not len(self._stage.kv):
            return True
        now_s = self._clock()
        quiet_s = min(now_s - max(self._leaving_s, self._probed_s), self._stage.leases.quiet_s)
        return (self._compute.idle and quiet_s >= _QUIET_S) or now_s - self._leaving_s >= self.settings.grace_s

    def probed(self) -> None:
        """A chain looks whether this replica drains, so it holds something here."""
        self._probed_s = self._clock()

    async def answer(
        self, event: Event, replica: str, path: str = "/", gone: Callable[[], bool] = lambda: False
    ) -> Event | None:
        """The reply to an event; None where there is none to give. `gone` tells whether nobody waits for it any more.
        Raises StageError."""
        if event.type == RESULT:
            return await self._pass_result(event, path)
        self._check_address(event)
        if event.type == SCORE:
            return await self._scorer.answer(event, self._when_loaded)
        if event.type == events.WAKE:
            return self._reply(event, events.WOKEN, await self._woken(replica), replica)
        if event.type == events.STEP:
            return await self._step(event, replica, gone)
        if event.type == events.RELEASE:
            return self._reply(event, events.RELEASED, await self._release(event), replica)
        if event.type == events.RENEW:
            return self._reply(event, events.RENEWED, self._renew(event), replica)
        if event.type == events.EXPORT:
            return await self._export(event, replica)
        if event.type == events.ADOPT:
            return self._reply(event, events.ADOPTED, await self._adopt(event, replica), replica)
        raise InvalidEvent(f"unknown event type {event.type!r}; this stage takes {', '.join(TAKEN_TYPES)}")

    def _check_address(self, event: Event) -> None:
        """Refuses what was meant for another plan or stage. Who sends the first score event need not know the plan."""
        plan, stage = event.extensions.get("plan"), event.extensions.get("stage")
        if plan is None and event.type == SCORE and self.settings.index == 0:
            plan = self.settings.plan
        if plan != self.settings.plan or stage != str(self.settings.index):
            raise PlanMismatch(
                f"the event is for stage {stage} of plan {plan}, this is stage {self.settings.index} of plan "
                f"{self.settings.plan}; orchestrator and stages must be started from the same plan"
            )

    async def _woken(self, replica: str) -> bytes:
        stage = await self._when_loaded()
        info = StageInfo(
            model=self.settings.model_name,
            plan=self.settings.plan,
            stage=self.settings.index,
            stages=self.settings.count,
            blocks=(stage.model.span.start, stage.model.span.end),
            replica=replica,
            dtype=str(stage.model.dtype).removeprefix("torch."),
            device=str(stage.model.device),
            hidden_size=stage.model.hidden_size,
            vocab_size=stage.model.vocab_size,
            max_positions=stage.model.max_positions,
            kv_bytes_per_token=stage.kv.bytes_per_token,
            kv_bytes_max=stage.kv.bytes_max,
            kv_bytes_used=stage.kv.bytes_used,
            weight_bytes=stage.model.weight_bytes,
            sequences=len(stage.kv),
            kv_lease_s=stage.leases.lease_s,
        )
        return json.dumps(dataclasses.asdict(info)).encode()

    async def _step(self, event: Event, replica: str, gone: Callable[[], bool]) -> Event:
        stage = await self._when_loaded()
        if event.content_type != events.TENSORS:
            raise InvalidEvent(f"the data of a step is {events.TENSORS}, got {event.content_type!r}")
        waiting = _Waiting(Step.from_body(event.data), time.perf_counter(), gone)
        self._waiting[waiting] = None
        self._watch_leases(stage)
        try:
            if self._compute.idle and self._quick.takes(waiting.step):
                answer = self._compute_waiting(stage, waiting)
            else:
                answer = await self._in_turn(self._compute_waiting, stage, waiting)
        finally:
            self._waiting.pop(waiting, None)  # it is still there only if its sender has left
        metrics.TOKENS.inc(len(waiting.step.tokens))
        extra = {"computeus": str(round(waiting.compute_s * 1e6))}
        data, *rest = answer.to_body()
        return self._reply(event, events.STEPPED, data, replica, events.TENSORS, extra, rest)

    def _compute_waiting(self, stage: Stage, first: _Waiting) -> Step | Samples:
        """The answer to `first`, computed now with what else waits, or already with another."""
        if first.outcome is None and first.gone():
            raise NotReady("whoever sent the step has left before its turn")
        if first.outcome is None:
            self._compute_together(stage, self._take(first))
        assert first.outcome is not None  # just computed
        if isinstance(first.outcome, Exception):
            raise first.outcome
        return first.outcome

    def _take(self, first: _Waiting) -> list[_Waiting]:
        """`first` and those that fit into one pass with it. One that repeats a step waits until that is computed."""
        together: list[_Waiting] = []
        sequences: set[int] = set()
        tokens = 0
        for waiting in (first, *(other for other in list(self._waiting) if other is not first and not other.gone())):
            its = {piece.sequence for piece in waiting.step.slices}
            tokens += len(waiting.step.tokens)
            if together and (tokens > _TOGETHER_TOKENS_MAX or its & sequences):
                break
            together.append(waiting)
            sequences |= its
        for waiting in together:
            self._waiting.pop(waiting, None)  # its sender may have left in this moment
        return together

    def _compute_together(self, stage: Stage, together: list[_Waiting]) -> None:
        with self._cores:
            started_s = time.perf_counter()
            outcomes = stage.steps([waiting.step for waiting in together])
            compute_s = time.perf_counter() - started_s
        self._quick.learn(sum(len(waiting.step.tokens) for waiting in together), compute_s)
        for waiting, outcome in zip(together, outcomes, strict=True):
            waiting.compute_s = compute_s
            waiting.outcome = _explained(outcome, waiting.step)
            metrics.WAIT_SECONDS.observe(started_s - waiting.arrived_s)
        metrics.COMPUTE_SECONDS.observe(compute_s)
        self._show_kv(stage)

    async def _computed(self, work: Callable[[], T]) -> T:
        """The result of a pass over texts, which waits for its turn among the steps."""
        arrived_s = time.perf_counter()

        def run() -> T:
            with self._cores, self._measured(arrived_s):
                return work()

        return await self._in_turn(run)

    @contextlib.contextmanager
    def _measured(self, arrived_s: float) -> Iterator[None]:
        """Around a computation: its time, and a StageFailure for whatever goes wrong in it."""
        started_s = time.perf_counter()
        try:
            yield
        except StageError:
            raise
        except Exception as error:
            raise _failure(error) from error
        finally:
            metrics.WAIT_SECONDS.observe(started_s - arrived_s)
            metrics.COMPUTE_SECONDS.observe(time.perf_counter() - started_s)

    async def _pass_result(self, event: Event, path: str) -> Event | None:
        """At SPENT_PATH the claim behind a result is let go. Elsewhere the result itself is the answer: in a Sequence
        a text that was refused passes the stages that are left."""
        if path != SPENT_PATH:
            return event
        await self._scorer.spend(event)
        return None

    async def _release(self, event: Event) -> bytes:
        sequences = decode_sequences(event.data)
        stage = self._stage
        if stage is None:  # still loading: nothing is held
            return b'{"released": []}'

        def release() -> list[int]:
            released = stage.release(sequences)
            self._show_kv(stage)
            return released

        return json.dumps({"released": await self._in_turn(release)}).encode()

    def _renew(self, event: Event) -> bytes:
        """At once, not in turn: a long computation must not let sequences expire whose renewal has come."""
        sequences = decode_sequences(event.data)
        unknown = list(sequences) if self._stage is None else self._stage.leases.renew(sequences)
        return json.dumps({"unknown": unknown}).encode()

    def _watch_leases(self, stage: Stage) -> None:
        """From now on, until no sequence is held."""
        if stage.leases.lease_s and (self._expiry is None or self._expiry.done()):
            self._expiry = asyncio.create_task(self._expire(stage))

    async def _expire(self, stage: Stage) -> None:
        def expire() -> bool:
            for waiting in list(self._waiting):  # they have come in time
                stage.leases.renew(piece.sequence for piece in waiting.step.slices)
            if expired := stage.expire():
                metrics.SEQUENCES_EXPIRED.inc(len(expired))
                log.warning("sequences_expired", count=len(expired), lease_s=stage.leases.lease_s)
                self._show_kv(stage)
            return len(stage.kv) > 0

        held = True
        while held or self._waiting:
            await asyncio.sleep(stage.leases.lease_s / _LOOKS_PER_LEASE)
            held = await self._in_turn(expire)

    async def _export(self, event: Event, replica: str) -> Event:
        asked = Export.from_body(event.data)
        stage = await self._when_loaded()
        bounded = dataclasses.replace(asked, bytes_max=min(asked.bytes_max, self.settings.body_bytes_max))
        pieces = await self._in_turn(stage.export, bounded)
        metrics.handed_over("out", len(pieces.openings), pieces.kv_bytes)
        data, *rest = pieces.to_body()
        return self._reply(event, events.EXPORTED, data, replica, events.TENSORS, rest=rest)

    async def _adopt(self, event: Event, replica: str) -> bytes:
        asked = Adopt.from_body(event.data)
        stage = await self._when_loaded()
        numbers = itertools.count(1)

        def export_event(data: bytes) -> Event:
            to = {name: event.extensions[name] for name in ("plan", "stage")}
            return Event(events.EXPORT, self._source(replica), f"{event.id}.{next(numbers)}", events.JSON, data, to)

        def held(sequence: int) -> int:
            return stage.kv.position(sequence) if stage.runner.in_rows else 0

        fetched_bytes = 0

        async def install(pieces: Pieces) -> None:
            nonlocal fetched_bytes
            try:
                await self._in_turn(stage.install, pieces)
            finally:
                self._show_kv(stage)
                self._watch_leases(stage)
            fetched_bytes += pieces.kv_bytes
            metrics.handed_over("in", len(pieces.openings), pieces.kv_bytes)

        try:
            bytes_max = min(PIECES_BYTES_MAX, self.settings.body_bytes_max)
            await adopt(asked, held, install, export_event, bytes_max, self._seals)
        except (StageError, FetchFailed) as error:  # the chain sends again what is missing
            log.warning("adoption_failed", source=asked.source, error=str(error), fetched_bytes=fetched_bytes)
        positions = {sequence: stage.kv.position(sequence) for sequence in asked.sequences}
        return Adopted(positions, fetched_bytes).to_body()

    async def _in_turn(self, work: Callable[..., T], *args: object) -> T:
        return await self._compute.run(work, *args)

    async def _when_loaded(self) -> Stage:
        """Holds an event that comes early, as an activator would. Raises NotReady if loading fails."""
        if self._stage is not None:
            return self._stage
        self.start()
        assert self._loading is not None
        return await asyncio.shield(asyncio.wrap_future(self._loading))

    def _load(self, loading: Future[Stage]) -> None:
        started_s = time.perf_counter()
        try:
            stage = _load_stage(self.settings, self._clock)
            seconds = time.perf_counter() - started_s
            metrics.LOAD_SECONDS.set(seconds)
            self._show_kv(stage)
            log.info("ready", blocks=str(self.settings.blocks), load_s=round(seconds, 3), processor=processor())
            self._stage = stage
            _settle(loading, stage)
        except (CheckpointError, SettingsError, OSError, MemoryError, torch.OutOfMemoryError) as error:
            self.failure = str(error) or type(error).__name__
        except Exception as error:
            log.exception("loading_failed")
            self.failure = f"loading failed: {type(error).__name__}: {error}"
        finally:
            _settle(loading, NotReady(self.failure or "the stage has no weights"))

    @staticmethod
    def _show_kv(stage: Stage) -> None:
        metrics.KV_BYTES.set(stage.kv.bytes_used)
        metrics.KV_BYTES_FILLED.set(stage.kv.bytes_filled)
        metrics.KV_BYTES_MAX.set(stage.kv.bytes_max)
        metrics.SEQUENCES.set(len(stage.kv))

    def _reply(
        self,
        event: Event,
        kind: str,
        data: Buffer,
        replica: str,
        content_type: str = events.JSON,
        extra: Mapping[str, str] | None = None,
        rest: Sequence[Buffer] = (),
    ) -> Event:
        extensions = {"replica": replica, **(extra or {})}
        return Event(kind, self._source(replica), f"{event.id}.reply", content_type, data, extensions, rest)

    def _source(self, replica: str) -> str:
        return f"/stagecraft/{self.settings.model_name}/stages/{self.settings.index}/{replica}"


def _explained(outcome: Outcome, step: Step) -> Outcome:
    if not isinstance(outcome, Exception) or isinstance(outcome, StageError):
        return outcome
    return _failure(outcome, slices=len(step.slices), tokens=len(step.tokens))


def _failure(error: Exception, **facts: int) -> StageFailure:
    log.error("step_failed", exc_info=error, **facts)
    return StageFailure(f"the computation failed ({type(error).__name__}); see the log of the stage")


def _open_cores(path: str) -> Cores:
    try:
        return Cores(path)
    except OSError as error:
        raise SettingsError(f"STAGE_CORES_LOCK names a file that cannot be opened: {error}") from None


def _settle(loading: Future[Stage], outcome: Stage | Exception) -> None:
    """Sets the result unless there is one: loading and stopping may both want to."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(outcome, Exception):
            loading.set_exception(outcome)
        else:
            loading.set_result(outcome)


def _load_stage(settings: StageSettings, clock: Clock) -> Stage:
    """Raises CheckpointError and SettingsError."""
    if (threads := settings.torch_threads()) != torch.get_num_threads():
        torch.set_num_threads(threads)
    device = settings.torch_device()
    location = checkpoint_location(settings.model)
    wait_for_checkpoint(location, settings.model_wait_s)
    checkpoint = open_checkpoint(location)
    dtype = settings.torch_dtype(checkpoint, device)
    runner = load_runner(checkpoint, settings.blocks, dtype, device, settings.quantize)
    return Stage(runner, settings.kv_budget_bytes(device), settings.kv_lease_s, clock)
