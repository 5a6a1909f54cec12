"""How events reach subscribers: one HTTP request a delivery, and what its answer means.

Names of this platform go through its own ingress, which wakes what is at zero and counts the request. After
pkg/broker/filter/filter_handler.go and pkg/kncloudevents/event_dispatcher.go of knative/eventing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import aiohttp
from aiohttp import hdrs
from yarl import URL

from knative.eventing.delivery import Format, is_success, parse_retry_after_s
from knative.eventing.event import CloudEvent, InvalidEvent
from knative.eventing.http_binding import Limits, is_event, parse, to_binary, to_structured

ATTEMPT_S_MAX = 15 * 60.0  # without a time-out of the delivery; Knative's channel ends all of a delivery then
_LIMITS = Limits()
_FAILED_BODY_BYTES_MAX = 64 * 1024
_CLUSTER = (".svc.cluster.local", ".svc")


@dataclass(frozen=True, slots=True)
class Answer:
    """`status` None: there was none (refused, broken, timed out). `events` are what a subscriber replied.

    `retry_after_s` is what a busy subscriber (429, 503) asks for."""

    status: int | None
    body: bytes = b""
    events: tuple[CloudEvent, ...] = ()
    retry_after_s: float | None = None

    @property
    def delivered(self) -> bool:
        return is_success(self.status)

    @property
    def code(self) -> int:
        """For people and dead letters, where no answer is 500 as in Knative."""
        return 500 if self.status is None else self.status


class Sender:
    """`ingress` gives HOST:PORT of the platform."""

    def __init__(self, session: aiohttp.ClientSession, ingress: Callable[[], str]) -> None:
        self._session = session
        self._ingress = ingress

    async def send(
        self,
        event: CloudEvent,
        url: str,
        *,
        namespace: str,
        event_format: Format | None,
        timeout_s: float | None,
        wants_reply: bool,
    ) -> Answer:
        """The subscriber's answer; never raises for what the subscriber or the network do."""
        headers, body = to_structured(event) if event_format == "json" else to_binary(event)
        headers["Kn-Namespace"] = namespace
        if wants_reply:
            headers["Prefer"] = "reply"
        try:
            async with asyncio.timeout(timeout_s or ATTEMPT_S_MAX):
                return await self._post(url, headers, body, wants_reply=wants_reply)
        except TimeoutError:
            return Answer(None, f"no answer from {url} within {timeout_s or ATTEMPT_S_MAX:g} s".encode())
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer(None, f"dispatch error: {error or type(error).__name__}".encode())

    async def _post(self, url: str, headers: dict[str, str], body: bytes, *, wants_reply: bool) -> Answer:
        target = URL(url)
        if (host := target.raw_host or "").endswith(_CLUSTER):
            headers[hdrs.HOST] = host
            path = target.raw_path_qs
            target = URL.build(scheme="http", authority=self._ingress(), path=path, encoded=True)
        async with self._session.post(target, headers=headers, data=body, allow_redirects=False) as answer:
            if is_success(answer.status):
                return await _success(answer, wants_reply=wants_reply)
            said = await answer.content.read(_FAILED_BODY_BYTES_MAX)
            retry_after = answer.headers.get(hdrs.RETRY_AFTER)
            return Answer(
                answer.status, said, retry_after_s=parse_retry_after_s(answer.status, retry_after, time.time())
            )


async def _success(answer: aiohttp.ClientResponse, *, wants_reply: bool) -> Answer:
    """A 2xx that has neither an event nor an empty body is a failure, as for Knative's filter."""
    body = await _body(answer.content)
    if not wants_reply:
        return Answer(answer.status)
    if body is None:
        return Answer(502, f"the reply has more than {_LIMITS.body_bytes} bytes".encode())
    return _read_reply(answer.status, answer.headers, body)


def _read_reply(status: int, headers: Mapping[str, str], body: bytes) -> Answer:
    if is_event(headers):
        try:
            return Answer(status, events=tuple(parse(headers, body, _LIMITS)))
        except InvalidEvent as error:
            return Answer(502, f"the reply is no CloudEvent: {error}".encode())
    if body:
        return Answer(502, b"the reply is no CloudEvent, and its body is not empty")
    return Answer(status)


async def _body(content: aiohttp.StreamReader) -> bytes | None:
    """None if it is too long."""
    pieces, size_bytes = [], 0
    async for piece in content.iter_any():
        size_bytes += len(piece)
        if size_bytes > _LIMITS.body_bytes:
            return None
        pieces.append(piece)
    return b"".join(pieces)
