"""Sends events to one stage and reads its replies: the orchestrator's only way to a stage.

Replicas are asked over connections of our own, for it is there that every step of a lane but the first goes. Services
are asked by aiohttp, which knows proxies and TLS; called directly, not through httpx: an event and its reply of 10 KB
took 0.17 ms against a bare echo, with httpx's aiohttp transport 0.57 ms, with httpx's own 1.1 ms (2 CPU cores).
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import time
import urllib.request
import uuid
from collections.abc import Mapping, Sequence
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractStreamWriter

from functions.contract import events
from functions.contract.errors import (
    CorruptEvent,
    InvalidEvent,
    StageError,
    StageFailure,
    StaleEvent,
    Unauthorized,
    from_json,
)
from functions.contract.events import Event
from functions.contract.frames import Buffer
from functions.contract.handover import Adopt, Adopted
from functions.contract.messages import StageInfo, encode_sequences
from functions.contract.seals import Seals
from orchestrator.stage_connection import CONNECT_TIMEOUT_S, WRITE_BYTES, ReplicaConnections, Reply, ReplyError

_SOURCE = f"/stagecraft/orchestrator/{uuid.uuid4().hex[:12]}"
_counter = itertools.count(1)
_REPLIES = {
    events.WAKE: events.WOKEN,
    events.STEP: events.STEPPED,
    events.RELEASE: events.RELEASED,
    events.RENEW: events.RENEWED,
    events.ADOPT: events.ADOPTED,
}


class StageUnreachable(Exception):
    """No reply: refused, reset, timed out, or an answer that is not ours. Another try may succeed."""


class StageSilent(StageUnreachable):
    """No reply in time: at work for longer than it may take, hung, or cut off."""


class StageClient:
    """One stage at its service URL. Raises StageError for error events and StageUnreachable for everything else.

    Events to the service go by the proxy that http_proxy, https_proxy and no_proxy name: on a single machine that is
    the ingress, which alone knows the services' names. Replicas are addresses and are asked directly."""

    def __init__(
        self, session: aiohttp.ClientSession, index: int, url: str, plan: str, seals: Seals | None = None
    ) -> None:
        self.index = index
        self.url = url
        self._session = session
        self._proxy = proxy_for(url)
        self._replicas = ReplicaConnections()
        self._seals = seals or Seals()
        self._extensions = {"plan": plan, "stage": str(index)}

    async def wake(self, timeout_s: float, url: str | None = None) -> StageInfo:
        """Asks the stage, or its replica at `url`, who it is; the answer comes once its weights are loaded."""
        reply = await self._send(events.WAKE, events.JSON, b"{}", {}, url, timeout_s)
        try:
            return StageInfo.from_json(json.loads(bytes(reply.data)))
        except (ValueError, RecursionError) as error:
            raise StageUnreachable(f"stage {self.index} at {self.url} answered no stage info: {error}") from None

    async def step(self, body: Buffer, lane: str, url: str | None, timeout_s: float) -> Event:
        """One pass through the stage's blocks, at `url` (a replica) or else at the service."""
        return await self._send(events.STEP, events.TENSORS, body, {"lane": lane}, url, timeout_s)

    async def release(self, data: bytes, url: str | None, timeout_s: float) -> None:
        await self._send(events.RELEASE, events.JSON, data, {}, url, timeout_s)

    async def renew(self, sequences: Sequence[int], url: str, timeout_s: float) -> list[int]:
        """Keeps sequences at the replica `url` from expiring; returns those that it does not know."""
        reply = await self._send(events.RENEW, events.JSON, encode_sequences(sequences), {}, url, timeout_s)
        try:
            return [int(sequence) for sequence in json.loads(bytes(reply.data))["unknown"]]
        except (ValueError, TypeError, KeyError) as error:
            raise StageUnreachable(f"stage {self.index} at {url} answered no renewal: {error}") from None

    async def adopt(self, adopt: Adopt, url: str, timeout_s: float) -> Adopted:
        """Has the replica at `url` fetch sequences from another."""
        reply = await self._send(events.ADOPT, events.JSON, adopt.to_body(), {}, url, timeout_s)
        try:
            return Adopted.from_body(reply.data)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise StageUnreachable(f"stage {self.index} at {url} answered no adoption: {error}") from None

    def close(self) -> None:
        """Closes what is open to replicas and not in use; the session is its owner's."""
        self._replicas.close()

    async def _send(
        self,
        kind: str,
        content_type: str,
        data: Buffer,
        extra: Mapping[str, str],
        replica: str | None,
        timeout_s: float,
    ) -> Event:
        """An event that was held up until its signature was too old (while a stage starts, say) is sent once more."""
        started_s = time.monotonic()
        try:
            return await self._exchange(kind, content_type, data, extra, replica, timeout_s)
        except StaleEvent:
            left_s = max(timeout_s - (time.monotonic() - started_s), CONNECT_TIMEOUT_S)
            return await self._exchange(kind, content_type, data, extra, replica, left_s)

    async def _exchange(
        self,
        kind: str,
        content_type: str,
        data: Buffer,
        extra: Mapping[str, str],
        replica: str | None,
        timeout_s: float,
    ) -> Event:
        event = Event(kind, _SOURCE, str(next(_counter)), content_type, data, {**self._extensions, **extra})
        headers, body = events.to_http(event)
        await self._seals.seal_request(headers, (body,))

        async def check(reply: Reply) -> None:
            await self._check(reply, headers)

        try:
            if replica is None:
                reply = await self._ask_service(headers, body, timeout_s)
                await check(reply)
            else:
                lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
                reply = await self._replicas.post(replica, lines, body, timeout_s, check)
        except (aiohttp.ClientError, ReplyError) as error:  # first: some of aiohttp's are TimeoutErrors, of connecting
            raise self._no_reply(replica, str(error) or type(error).__name__) from error
        except TimeoutError as error:
            where = replica or self.url
            raise StageSilent(f"stage {self.index} at {where} gave no reply in {timeout_s:.3g} s") from error
        except OSError as error:
            raise self._no_reply(replica, str(error) or type(error).__name__) from error
        return self._reply(reply, _REPLIES[kind])

    def _no_reply(self, replica: str | None, reason: str) -> StageUnreachable:
        return StageUnreachable(f"stage {self.index} at {replica or self.url} gave no reply: {reason}")

    async def _check(self, reply: Reply, request: Mapping[str, str]) -> None:
        """Raises ReplyError for a reply that is not what the stage said, or not to this request; Unauthorized where
        the stage says that it does not know our key, so that we cannot know its signature either."""
        if "ce-type" not in reply.headers:
            return  # no event at all, which is told with what it says instead
        try:
            self._seals.check_reply_head(reply.headers, request)
            await self._seals.check_body(reply.headers, reply.body)
        except CorruptEvent:
            raise ReplyError(f"status {reply.status} with a reply that is damaged, or not to this event") from None
        except Unauthorized as error:
            if isinstance(told := self._told(reply), Unauthorized):
                raise told from None
            raise ReplyError(f"status {reply.status}, and {error}") from None

    def _told(self, reply: Reply) -> StageError | None:
        """The error that a reply tells, if it tells one."""
        return self._error(bytes(reply.body)) if reply.headers.get("ce-type") == events.ERROR else None

    async def _ask_service(self, headers: Mapping[str, str], body: Buffer, timeout_s: float) -> Reply:
        timeout = aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_TIMEOUT_S)
        asked = self._session.post(self.url, data=_Pieces(body), headers=headers, timeout=timeout, proxy=self._proxy)
        async with asked as response:
            content = bytearray()
            async for chunk in response.content.iter_any():  # read() would keep all chunks, and join them
                content += chunk
            names = {name.lower(): value for name, value in response.headers.items()}
            return Reply(response.status, names, content)

    def _reply(self, answer: Reply, expected: str) -> Event:
        try:
            reply = events.from_lower_case(answer.headers, answer.body)
        except InvalidEvent:
            text = bytes(answer.body[:200]).decode(errors="replace")
            raise StageUnreachable(f"stage {self.index} answered {answer.status}, no event: {text}") from None
        if reply.type == events.ERROR:
            error = self._error(bytes(answer.body))
            error.replica = reply.extensions.get("replica")
            raise error
        if answer.status != 200 or reply.type != expected:
            raise StageUnreachable(f"stage {self.index} answered {reply.type} with status {answer.status}")
        return reply

    def _error(self, content: bytes) -> StageError:
        try:
            return from_json(json.loads(content))
        except (ValueError, TypeError, RecursionError):
            return StageFailure(f"stage {self.index} answered an error that cannot be read")


class _Pieces(aiohttp.Payload):
    """A body that is sent piece by piece: aiohttp joins one that is sent whole to the headers, so copies it."""

    _value: Buffer

    def __init__(self, body: Buffer) -> None:
        super().__init__(body, content_type="application/octet-stream")
        self._size = len(body)

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._value).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        view = memoryview(self._value)
        for at in range(0, len(view), WRITE_BYTES):
            await writer.write(view[at : at + WRITE_BYTES])


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for a URL, read once. A loopback address never has one."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    if _is_loopback(host) or urllib.request.proxy_bypass(host):
        return None
    return urllib.request.getproxies().get(parts.scheme)


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
