"""What a request says about itself besides its body: its idempotency key, and until when it wants its answer.

KServe's handlers pass no headers of ours on, so they travel in a context variable, read when an endpoint asks: what is
wrong with them is then told as that endpoint tells all errors.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from orchestrator.generation import GenerationError, choice_seed
from orchestrator.idempotency import HEADER as KEY_HEADER
from orchestrator.idempotency import Key, make_key

TIMEOUT_HEADER = "x-request-timeout-ms"
TIMEOUT_MS_MAX = 7 * 24 * 3600 * 1000
_CREDENTIALS = ("authorization", "x-api-key", "api-key")  # a key counts within what its sender may see
_WANTED = frozenset((KEY_HEADER, TIMEOUT_HEADER, *_CREDENTIALS))

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Terms:
    """`deadline_s` is one of time.monotonic()."""

    key: Key | None = None
    deadline_s: float | None = None


NO_TERMS = Terms()


@dataclass(frozen=True, slots=True)
class Given:
    """The same before it was read. `left_s` is what the way that the request came leaves it, None: as long as it takes.
    Header names are in lower case, with all their values."""

    endpoint: str
    headers: Mapping[str, Sequence[str]]
    body: bytes  # empty where no key needs it
    arrived_s: float
    left_s: float | None

    def read(self) -> Terms:
        """Raises GenerationError (400)."""
        keys = self.headers.get(KEY_HEADER, ())
        if len(keys) > 1:
            raise _invalid(f"Idempotency-Key was given {len(keys)} times; give one")
        key = make_key(keys[0], (self.endpoint, *self._credentials()), self.body) if keys else None
        lefts_s = [left_s for left_s in (self._timeout_s(), self.left_s) if left_s]
        return Terms(key, self.arrived_s + min(lefts_s) if lefts_s else None)

    def _credentials(self) -> Iterator[str]:
        for name in _CREDENTIALS:
            yield hashlib.sha256(repr(self.headers.get(name, ())).encode(errors="surrogateescape")).hexdigest()

    def _timeout_s(self) -> float | None:
        texts = self.headers.get(TIMEOUT_HEADER, ())
        if not texts:
            return None
        text = texts[0].strip()
        whole = text.isascii() and text.isdecimal() and len(text) <= len(str(TIMEOUT_MS_MAX))
        if len(texts) > 1 or not whole or not 0 < int(text) <= TIMEOUT_MS_MAX:
            shown = ", ".join(texts)
            raise _invalid(
                f"{TIMEOUT_HEADER} must be one whole number of milliseconds in 1..{TIMEOUT_MS_MAX}, got {shown[:40]!r}"
            )
        return int(text) / 1000


_given: ContextVar[Given | None] = ContextVar("given", default=None)


def current_terms() -> Terms:
    """Those of the request that is being answered. Raises GenerationError (400)."""
    given = _given.get()
    return NO_TERMS if given is None else given.read()


@contextlib.contextmanager
def under(given: Given) -> Iterator[None]:
    """Around the answer to a request."""
    token = _given.set(given)
    try:
        yield
    finally:
        _given.reset(token)


def seeded(body: Mapping[str, Any], terms: Terms, place: int = 0) -> Mapping[str, Any]:
    """A request's body with the seed of its key, where it has a key and no seed. `place`: among requests that share
    the key."""
    if terms.key is None or body.get("seed") is not None:
        return body
    return {**body, "seed": choice_seed(terms.key.seed, place)}


class TermsReader:
    """ASGI middleware that keeps what endpoints may ask for with `current_terms`. To be put behind what bounds bodies:
    it holds those of requests with a key."""

    def __init__(self, app: App, *, timeout_s: float) -> None:
        """`timeout_s` bounds what a request may ask for; 0: it may take as long as it wants."""
        self._app = app
        self._timeout_s = timeout_s or None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        arrived_s = time.monotonic()
        headers: dict[str, list[str]] = {}
        for name, value in scope["headers"]:
            if (text := name.decode("latin-1").lower()) in _WANTED:
                headers.setdefault(text, []).append(value.decode("latin-1"))
        body = b""
        if KEY_HEADER in headers:
            body, receive = await _read_ahead(receive)
        with under(Given(scope["path"], headers, body, arrived_s, self._timeout_s)):
            await self._app(scope, receive, send)


async def _read_ahead(receive: Receive) -> tuple[bytes, Receive]:
    """The body, and what gives it once more."""
    messages = [await receive()]
    while messages[-1].get("more_body", False):
        messages.append(await receive())
    ahead = iter(messages)

    async def again() -> Message:
        message = next(ahead, None)
        return await receive() if message is None else message

    return b"".join(message.get("body", b"") for message in messages), again


def _invalid(message: str) -> GenerationError:
    return GenerationError(message, status=400, code="invalid_header")
