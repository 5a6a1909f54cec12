"""What shows that an event is as it was sent: a digest of all of it, and with a shared key a signature.

    ce-digest     BODY.HEAD: what the body hashes to, and a checksum of the attributes and of BODY
    ce-signedat   milliseconds since 1970, by the sender's clock            (with a key)
    ce-signature  HMAC-SHA256 of the attributes and of BODY                 (with a key)

HEAD is checked before the body is read, so nobody without the key can make a stage read one. A reply is bound to its
request: its HEAD covers the request's HEAD, its signature the request's signature. So it can be taken for no other's.

BODY is XXH3-64 (16 hexadecimal digits), for bytes that flip on their way; with a key SHA-256 (64 of them). XXH3 reads
10 KB in 0.3 us and 16 MB in 0.7 ms, zlib's CRC-32 in 2.5 us and 4.2 ms; SHA-256 takes 7.5 us and 12 ms, BLAKE2b twice
as long (2026-11-28, 2 CPU cores). `docs/events.md` describes all of it for readers of other languages.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from typing import Protocol

import xxhash

from functions.contract.errors import CorruptEvent, StaleEvent, Unauthorized
from functions.contract.frames import Buffer
from functions.contract.watched_file import WatchedFile, key_lines

DIGEST, SIGNATURE, SIGNED_AT = "ce-digest", "ce-signature", "ce-signedat"
OURS = "/stagecraft/"  # sources that begin so always give a digest: one that is missing was lost on the way
CLOCK_SKEW_S = 60.0
KEY_BYTES_MIN = 16

_BESIDE_BYTES_MIN = 1 << 20  # SHA-256 of so much takes a millisecond, in which the event loop can do other things
_SEEN_MAX = 1 << 20  # events of two windows; about 100 bytes each
_BUCKETS_PER_WINDOW = 4
_SHA256_DIGITS = 64
_NOT_DIGESTED = frozenset((DIGEST,))
_NOT_SIGNED = frozenset((DIGEST, SIGNATURE))
_ASKED = "request"
_OTHER_BODY = "the body is not as it was sent: its digest is another one; send it again"


def parse_keys(content: bytes) -> tuple[bytes, ...]:
    """One key a line, the first of which signs. Raises ValueError, which quotes none of them."""
    lines = key_lines(content)
    if not lines:
        raise ValueError("it holds no key; write one a line, such as `openssl rand -hex 32` prints")
    for number, line in lines:
        if len(line.encode()) < KEY_BYTES_MIN:
            raise ValueError(f"the key in line {number} has less than {KEY_BYTES_MIN} bytes")
    return tuple(line.encode() for _, line in lines)


class Seals:
    """Seals what is sent and checks what arrives. `keys` None: digests only."""

    def __init__(
        self,
        keys: WatchedFile[tuple[bytes, ...]] | None = None,
        clock_skew_s: float = CLOCK_SKEW_S,
        now_s: Callable[[], float] = time.time,
    ) -> None:
        self._keys = keys
        self._now_s = now_s
        self._seen = SeenEvents(clock_skew_s, now_s)
        self._passing = _Passing()

    @classmethod
    def open(cls, key_file: Path | None, clock_skew_s: float = CLOCK_SKEW_S) -> Seals:
        """With the keys of a file, which is read again when it changes. Raises watched_file.FileError."""
        return cls(None if key_file is None else WatchedFile(key_file, parse_keys), clock_skew_s)

    @property
    def signed(self) -> bool:
        return self._keys is not None

    # -- what is sent

    async def seal_request(self, headers: MutableMapping[str, str], parts: Sequence[Buffer]) -> None:
        """Adds the attributes to the headers (lower case, as events.to_http makes them) of an event with this body."""
        body = await self._body(parts)
        if self._keys is not None:
            headers[SIGNED_AT] = str(int(self._now_s() * 1000))
        self._add(headers, body, _ASKED, _ASKED)

    async def seal_reply(
        self, headers: MutableMapping[str, str], parts: Sequence[Buffer], request: Mapping[str, str]
    ) -> None:
        """The same for the reply to a request with the headers `request`, as they arrived."""
        self._add(headers, await self._body(parts), *_contexts(request))

    def _add(self, headers: MutableMapping[str, str], body: str, digested: str, signed: str) -> None:
        if self._keys is not None:
            headers[SIGNATURE] = _signature(self._keys.value[0], _statement(signed, headers, _NOT_SIGNED, body))
        headers[DIGEST] = f"{body}.{_checksum(_statement(digested, headers, _NOT_DIGESTED, body))}"

    async def _body(self, parts: Sequence[Buffer]) -> str:
        strong = self._keys is not None
        return (len(parts) == 1 and self._passing.find(parts[0], strong)) or await _hashed(parts, strong)

    # -- what arrives

    def check_request_head(self, headers: Mapping[str, str]) -> None:
        """To be called before the body is read. Raises CorruptEvent, Unauthorized and StaleEvent."""
        body = _check_digest(headers, _ASKED)
        if self._keys is None:
            return
        if body is None or SIGNATURE not in headers:
            raise Unauthorized(
                "the event is not signed, and this stage takes none that is not: give the sender the same key file as "
                "the stages (STAGE_SIGNING_KEY_FILE; --stage-signing-key-file of the orchestrator)"
            )
        if not self._is_signed(headers, _ASKED, body):
            raise Unauthorized(
                "the event is signed with another key than this stage has: give both the same key file; while keys are "
                "changed, both keys in it"
            )
        self._seen.take(headers)

    def check_reply_head(self, headers: Mapping[str, str], request: Mapping[str, str]) -> None:
        """Of the reply to a request that was sent with the headers `request`. Raises CorruptEvent, Unauthorized."""
        digested, signed = _contexts(request)
        body = _check_digest(headers, digested)
        if self._keys is not None and (body is None or not self._is_signed(headers, signed, body)):
            raise Unauthorized("the reply is not signed with a key that this orchestrator has")

    async def check_body(self, headers: Mapping[str, str], body: Buffer) -> None:
        """After the head. Raises CorruptEvent for a body that is not the one that the head promises."""
        promised = headers.get(DIGEST, "").partition(".")[0]
        if promised and promised != await _hashed((body,), _is_strong(promised)):
            raise CorruptEvent(_OTHER_BODY)
        self._passing.keep(body, promised)

    def _is_signed(self, headers: Mapping[str, str], context: str, body: str) -> bool:
        """By any of the keys. A checksum in place of SHA-256 would be no proof of the body."""
        assert self._keys is not None  # asked only then
        given = headers.get(SIGNATURE, "").encode(errors="replace")
        statement = _statement(context, headers, _NOT_SIGNED, body)
        # all keys each time, so that the time tells nothing of them
        found = [hmac.compare_digest(_signature(key, statement).encode(), given) for key in self._keys.value]
        return any(found) and _is_strong(body)


class Arriving:
    """The same check for a body that arrives in pieces: hashed as they come, which then are in the processor's caches,
    and while others are on their way."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        self._promised = headers.get(DIGEST, "").partition(".")[0]
        self._hasher = _hasher(_is_strong(self._promised)) if self._promised else None

    def add(self, piece: Buffer) -> None:
        if self._hasher is not None:
            self._hasher.update(piece)

    def check(self) -> None:
        """Once it is whole. Raises CorruptEvent."""
        if self._hasher is not None and self._hasher.hexdigest() != self._promised:
            raise CorruptEvent(_OTHER_BODY)


class _Passing:
    """BODY of large bodies that have been checked, for as long as they live: an orchestrator sends them on unopened."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Buffer], str]] = {}

    def keep(self, body: Buffer, digest: str) -> None:
        if isinstance(body, memoryview) and digest:
            place = id(body)
            self._known[place] = weakref.ref(body, lambda _: self._known.pop(place, None)), digest

    def find(self, body: Buffer, strong: bool) -> str | None:
        reference, digest = self._known.get(id(body), (None, ""))
        return digest if reference is not None and reference() is body and _is_strong(digest) == strong else None


class SeenEvents:
    """Which signed events have been here, so that none is carried out twice. Remembers as long as it must: an event
    whose time is further from now than the window is refused anyway. Memory is bounded: where more come than it can
    remember, the window becomes smaller."""

    def __init__(self, window_s: float, now_s: Callable[[], float], events_max: int = _SEEN_MAX) -> None:
        self._window_s = window_s
        self._now_s = now_s
        self._events_max = events_max
        self._bucket_s = max(window_s / _BUCKETS_PER_WINDOW, 0.001)
        self._buckets: dict[int, set[str]] = {}  # by the time of signing
        self._count = 0
        self._first = -(1 << 62)  # buckets before this one have been forgotten for want of memory

    def take(self, headers: Mapping[str, str]) -> None:
        """Raises StaleEvent for an event that is too old, from the future, or has been here."""
        signed_s = self._time(headers)
        number = math.floor(signed_s / self._bucket_s)
        if number < self._first:
            raise StaleEvent("this stage cannot remember whether the event has been here before; sign it again")
        seen = self._buckets.get(number)
        if seen is None:
            self._forget()
            seen = self._buckets[number] = set()
        event = headers[SIGNATURE]
        if event in seen:
            raise StaleEvent("the event has been here before; sent again, it needs a new id and a new signature")
        seen.add(event)
        self._count += 1
        if self._count > self._events_max:
            oldest = min(self._buckets)
            self._first = oldest + 1
            self._count -= len(self._buckets.pop(oldest))

    def _time(self, headers: Mapping[str, str]) -> float:
        text = headers.get(SIGNED_AT, "")
        if not (text.isascii() and text.isdecimal() and len(text) <= 15):
            raise StaleEvent("signedat must be the milliseconds since 1970 at which the event was signed")
        signed_s = int(text) / 1000
        off_s = self._now_s() - signed_s
        if abs(off_s) > self._window_s:
            raise StaleEvent(
                f"the event was signed {abs(off_s):.0f} s {'ago' if off_s > 0 else 'in the future'}, at most "
                f"{self._window_s:g} s are allowed (STAGE_CLOCK_SKEW_S): sign it again, and if that does not help set "
                "the clocks of the machines (NTP)"
            )
        return signed_s

    def _forget(self) -> None:
        oldest = math.floor((self._now_s() - self._window_s) / self._bucket_s)
        for number in [number for number in self._buckets if number < oldest]:
            self._count -= len(self._buckets.pop(number))


def _check_digest(headers: Mapping[str, str], context: str) -> str | None:
    """BODY of the digest; None where the sender gives no digest. Raises CorruptEvent."""
    digest = headers.get(DIGEST)
    if digest is None:
        if headers.get("ce-source", "").startswith(OURS):
            raise CorruptEvent("the event has lost its digest on the way; send it again")
        return None
    body, _, head = digest.partition(".")
    if not body or head != _checksum(_statement(context, headers, _NOT_DIGESTED, body)):
        raise CorruptEvent("the attributes are not as they were sent: their digest is another one; send it again")
    return body


def _contexts(request: Mapping[str, str]) -> tuple[str, str]:
    """What digest and signature of a reply begin with."""
    return f"reply {request.get(DIGEST, '').partition('.')[2]}", f"reply {request.get(SIGNATURE, '')}"


def _statement(context: str, headers: Mapping[str, str], left_out: frozenset[str], body: str) -> bytes:
    """Context, content type, attributes as `name:value` in their order, BODY: one a line. No value holds a line end."""
    lines = [f"{name}:{value}" for name, value in headers.items() if name[:3] == "ce-" and name not in left_out]
    lines.sort()
    return "\n".join((context, headers.get("content-type", ""), *lines, body)).encode(errors="surrogatepass")


def _checksum(statement: bytes) -> str:
    return xxhash.xxh3_64_hexdigest(statement)


def _signature(key: bytes, statement: bytes) -> str:
    return hmac.digest(key, statement, "sha256").hex()


class _Hasher(Protocol):
    def update(self, data: Buffer, /) -> object: ...
    def hexdigest(self) -> str: ...


def _hasher(strong: bool) -> _Hasher:
    return hashlib.sha256() if strong else xxhash.xxh3_64()


def _is_strong(body: str) -> bool:
    return len(body) == _SHA256_DIGITS


async def _hashed(parts: Sequence[Buffer], strong: bool) -> str:
    """BODY of a body that lies in these parts."""
    if strong and sum(map(len, parts)) >= _BESIDE_BYTES_MIN:
        return await asyncio.to_thread(_hash, _hasher(strong), parts)
    return _hash(_hasher(strong), parts)


def _hash(hasher: _Hasher, parts: Iterable[Buffer]) -> str:
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()
