"""Idempotency keys: which requests are the same one, and what is kept of those that have ended. No I/O and no clock.

After draft-ietf-httpapi-idempotency-key-header-07, "The Idempotency-Key HTTP Header Field". Where the draft would have
a request refused (409) because the first of its key is not over, here it joins that one.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from functions.contract.sampling import SEED_BOUND
from orchestrator.generation import GenerationError

HEADER = "idempotency-key"
CHARACTERS_MAX = 255

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Key:
    """`digest` names the generation: the same for the same endpoint, credentials and key, whichever process is asked.
    `body` tells whether it is the same request. Both are SHA-256 in hexadecimal, so that no secret is kept."""

    digest: str
    body: str

    @property
    def tag(self) -> str:
        """Names the generation to those outside: 128 bits in hexadecimal."""
        return self.digest[:32]

    @property
    def seed(self) -> int:
        """Of a request that gives none: so its text does not depend on who computes it when."""
        return int(self.digest[32:], 16) % SEED_BOUND


def make_key(text: str, scope: Sequence[str], body: bytes) -> Key:
    """`text` is the header, `scope` what a key is valid within. Raises GenerationError (400)."""
    parts = [*scope, _checked(text)]
    # lengths before the parts: no two scopes with their keys read the same
    joined = "".join(f"{len(part)}:{part}" for part in parts)
    return Key(hashlib.sha256(joined.encode(errors="surrogateescape")).hexdigest(), hashlib.sha256(body).hexdigest())


def reused() -> GenerationError:
    return GenerationError(
        "this Idempotency-Key was sent with another request before; give each new request a key of its own, and "
        "repeat one only with the very same body",
        status=422,
        code="idempotency_key_reused",
    )


class Kept(Generic[T]):
    """Values for `keep_s` after they were put in. The oldest go first where they are too many or too large."""

    def __init__(self, keep_s: float, count_max: int, bytes_max: int) -> None:
        self._keep_s = keep_s
        self._count_max = count_max
        self._bytes_max = bytes_max
        self._entries: OrderedDict[str, tuple[T, int, float]] = OrderedDict()  # value, bytes, until when; oldest first
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def put(self, name: str, value: T, size_bytes: int, now_s: float) -> None:
        """One that is larger than all that may be kept is not kept."""
        self._drop(name)
        if size_bytes <= self._bytes_max:
            self._entries[name] = (value, size_bytes, now_s + self._keep_s)
            self.bytes += size_bytes
        self.sweep(now_s)

    def get(self, name: str, now_s: float) -> T | None:
        self.sweep(now_s)
        entry = self._entries.get(name)
        return None if entry is None else entry[0]

    def sweep(self, now_s: float) -> None:
        while self._entries:
            name, (_, _, until_s) = next(iter(self._entries.items()))
            if until_s > now_s and self.bytes <= self._bytes_max and len(self._entries) <= self._count_max:
                return
            self._drop(name)

    def _drop(self, name: str) -> None:
        entry = self._entries.pop(name, None)
        if entry is not None:
            self.bytes -= entry[1]


def _checked(text: str) -> str:
    """The key without the quotes that the draft wants around it, and that most clients leave out."""
    key = text.strip()
    if key.startswith('"'):
        key = _unquoted(key)
    if not 0 < len(key) <= CHARACTERS_MAX or not all(" " <= sign <= "~" for sign in key):
        raise _malformed(f"it must have 1 to {CHARACTERS_MAX} printable ASCII characters")
    return key


def _unquoted(text: str) -> str:
    """The content of a string of structured fields (RFC 8941, 3.3.3)."""
    content, rest = [], iter(text[1:-1])
    if len(text) < 2 or not text.endswith('"'):
        raise _malformed("the quote at its beginning has none at its end")
    for sign in rest:
        if sign == "\\":
            sign = next(rest, "")
            if sign not in ('"', "\\"):
                raise _malformed("a backslash may stand only before a quote or another backslash")
        elif sign == '"':
            raise _malformed("a quote within it needs a backslash before it")
        content.append(sign)
    return "".join(content)


def _malformed(reason: str) -> GenerationError:
    return GenerationError(f"the header Idempotency-Key cannot be used: {reason}", status=400, code="invalid_header")
