"""Score events answered: each with the event for the next stage, or with the result.

A broker delivers at least once, and here nobody else watches. So the answer to an event is a function of the event: the
same id, the same claim, the same numbers. What is done already is answered with nothing, and what can never be done
with a result that says why, so that nobody waits for it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Protocol, TypeVar

import structlog
import torch

from functions import metrics
from functions.claims import ClaimLost, Claims
from functions.contract.errors import EventTooLarge, InvalidEvent, PromptTooLong, StageError
from functions.contract.events import TENSORS, Event
from functions.contract.frames import Buffer
from functions.contract.scoring import Texts, next_event, next_id, result_event
from functions.scoring import answers_of, check_texts, parts, states_of
from functions.settings import StageSettings
from functions.stage import Stage, frame_of

LATE_WAITS_S = (0.1, 0.3, 0.6, 1.0)  # a network file system may show a new file a little later
_SWEEPS_PER_AGE = 24
_SWEEP_EVERY_S_MIN = 60.0
_GONE = 410
_NEVER = (InvalidEvent, EventTooLarge, PromptTooLong)  # wrong in themselves, however often they come

T = TypeVar("T")

log = structlog.get_logger()


class Compute(Protocol):
    """Runs work in the stage's compute thread, one after another. Raises StageError."""

    def __call__(self, work: Callable[[], T]) -> Awaitable[T]: ...


class Scorer:
    """One stage's part in scoring. Raises SettingsError for a STAGE_CLAIMS that cannot be opened."""

    def __init__(self, settings: StageSettings, compute: Compute) -> None:
        self._settings = settings
        self._compute = compute
        self._claims = settings.open_claims()
        self._sweeping: asyncio.Task[None] | None = None
        self._next_sweep_s = 0.0

    async def answer(self, event: Event, stage: Callable[[], Awaitable[Stage]]) -> Event | None:
        """The next event or the result; None when there is nothing left to do. Raises StageError.

        What is wrong with an event that belongs to a request is its result."""
        self._sweep_now_and_then()
        try:
            body = await self._body(event)
            if body is None:
                return None
            texts = Texts.from_body(body)
            loaded = await stage()
            check_texts(loaded.runner, texts, self._settings.score_tokens_max)
        except _NEVER as error:
            return self._failed(event, error.status, error.code, error)
        except ClaimLost:
            message = f"the data at {event.extensions['dataref']} is gone: removed by age, or not in STAGE_CLAIMS"
            return self._failed(event, _GONE, "claim_lost", InvalidEvent(message))
        await self.spend(event)
        metrics.TOKENS.inc(len(texts.tokens))
        if loaded.model.ends.last:
            return await self._result(event, loaded, texts)
        return await self._next(event, loaded, texts)

    async def spend(self, event: Event) -> None:
        """The event before `event` has been dealt with, as its answer has come out of the broker."""
        usedref = event.extensions.get("usedref")
        if self._claims is None or usedref is None:
            return
        try:
            await asyncio.to_thread(self._claims.spend, usedref)
        except StageError as error:  # it is removed by age then
            log.warning("claim_not_spent", usedref=usedref, error=str(error))

    async def _body(self, event: Event) -> Buffer | None:
        """The event's data, wherever they are; None if they are spent. Raises ClaimLost and StageError."""
        if event.content_type != TENSORS:
            raise InvalidEvent(f"the data of a score event is {TENSORS}, got {event.content_type!r}")
        dataref = event.extensions.get("dataref")
        if dataref is None:
            return event.data
        if self._claims is None:
            raise InvalidEvent("the event refers to its data (dataref), but this stage has no STAGE_CLAIMS to find it")
        for wait_s in LATE_WAITS_S:
            try:
                return await asyncio.to_thread(self._claims.read, dataref, self._settings.body_bytes_max)
            except ClaimLost:
                await asyncio.sleep(wait_s)
        return await asyncio.to_thread(self._claims.read, dataref, self._settings.body_bytes_max)

    async def _next(self, event: Event, stage: Stage, texts: Texts) -> Event:
        states = [await self._compute(partial(states_of, stage.runner, texts, part)) for part in parts(texts)]
        hidden = frame_of(torch.cat(states))
        data = Texts(texts.lengths, texts.tokens, hidden, texts.ask).to_body()
        dataref = None
        if self._claims is not None and sum(map(len, data)) > self._settings.claim_bytes:
            dataref, data = await asyncio.to_thread(self._claims.write, next_id(event), data), []
        settings = self._settings
        return next_event(event, settings.plan, settings.index + 1, settings.model_name, b"".join(data), dataref)

    async def _result(self, event: Event, stage: Stage, texts: Texts) -> Event:
        answers: list[dict[str, Any]] = []
        for part in parts(texts):
            answers += await self._compute(partial(answers_of, stage.runner, texts, part, len(answers)))
        count = len(texts.tokens)
        body = {
            "object": "list",
            "data": answers,
            "model": self._settings.model_name,
            "usage": {"prompt_tokens": count, "total_tokens": count},
        }
        return result_event(event, self._settings.model_name, 200, body)

    def _failed(self, event: Event, status: int, code: str, error: StageError) -> Event:
        """A result, where somebody waits for it. Raises `error` where nobody can be told otherwise."""
        if not event.extensions.get("batch"):
            raise error
        what = {"message": str(error), "type": "invalid_request_error", "param": None, "code": code}
        return result_event(event, self._settings.model_name, status, {"error": what})

    def _sweep_now_and_then(self) -> None:
        now_s = time.monotonic()
        if self._claims is None or now_s < self._next_sweep_s:
            return
        self._next_sweep_s = now_s + max(_SWEEP_EVERY_S_MIN, self._settings.claim_age_s / _SWEEPS_PER_AGE)
        self._sweeping = asyncio.create_task(self._sweep(self._claims))

    async def _sweep(self, claims: Claims) -> None:
        try:
            if removed := await asyncio.to_thread(claims.sweep, self._settings.claim_age_s):
                log.info("claims_removed", count=removed, age_s=self._settings.claim_age_s)
        except StageError as error:
            log.warning("claims_not_swept", error=str(error))
