"""Hands events to a broker until it has them all."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO

import aiohttp

from knative.eventing.event import CloudEvent
from knative.eventing.http_binding import BATCHED, to_binary
from orchestrator.batches.patience import RETRIED, Patience, Tell

SINGLE_AT_ONCE = 64
REFUSED = frozenset((400, 413, 415, 422))  # of the event itself, or of events in batches
TIMEOUT_S = 60.0


class ServiceError(Exception):
    """A server that will not do it, however often it is asked; the text says what to check."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why the broker does not take an event."""

    status: int
    text: str

    def __str__(self) -> str:
        return f"the broker refused it with {self.status}: {self.text}"


class BrokerClient:
    """`url` is a broker's address, http://HOST/NAMESPACE/BROKER. What it waits for is told.

    `is_known`: it has taken something before, so that it is a broker, and a 404 means that it is started again."""

    def __init__(self, http: aiohttp.ClientSession, url: str, tell: Tell, *, is_known: bool = False) -> None:
        self._http = http
        self._url = url
        self._patience = Patience(tell)
        self._slots = asyncio.Semaphore(SINGLE_AT_ONCE)
        self._takes_batches = True
        self._is_known = is_known

    async def deliver(self, events: Sequence[CloudEvent]) -> dict[str, Refusal]:
        """Returns when the broker has accepted all events but those in the answer (by id), which it will never take.

        Raises ServiceError when it takes nothing at all. Safe to be repeated: ids are stable."""
        if not events:
            return {}
        tried_batch = self._takes_batches
        if tried_batch:
            body = b"[" + b",".join(event.to_json() for event in events) + b"]"
            if await self._post({"content-type": BATCHED}, body) is None:
                return {}
        answers = await asyncio.gather(*(self._single(event) for event in events))
        refused = {event.id: answer for event, answer in zip(events, answers, strict=True) if answer}
        if tried_batch and not refused:  # so it was the mode that it did not like
            self._takes_batches = False
        return refused

    async def _single(self, event: CloudEvent) -> Refusal | None:
        async with self._slots:
            return await self._post(*to_binary(event))

    async def _post(self, headers: Mapping[str, str], body: bytes) -> Refusal | None:
        timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
        while True:
            await self._patience.ready()
            try:
                # in pieces: a chunk of events as bytes would be one long write, during which nothing else is done
                async with self._http.post(
                    self._url, data=BytesIO(body), headers=headers, timeout=timeout, allow_redirects=False
                ) as answer:
                    text = " ".join((await answer.text(errors="replace")).split())[:300] or str(answer.reason)
            except aiohttp.InvalidURL:
                raise ServiceError(f"{self._url!r} is no URL such as http://127.0.0.1:8080/default/default") from None
            except (aiohttp.ClientError, TimeoutError) as error:
                self._patience.failed(f"the broker {self._url} cannot be reached: {error or type(error).__name__}")
                continue
            if answer.status < 300:
                self._is_known = True
                self._patience.worked()
                return None
            if answer.status in REFUSED:
                return Refusal(answer.status, text)
            # a broker that is started again may be unknown for a moment
            if answer.status not in RETRIED and not (answer.status == 404 and self._is_known):
                raise ServiceError(f"{self._url} takes no events, it answers {answer.status}: {text}; check --broker")
            self._patience.failed(f"the broker answers {answer.status}: {text}", answer.headers.get("retry-after"))
