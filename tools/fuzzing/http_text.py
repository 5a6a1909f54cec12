"""A request as the bytes of HTTP/1.1, which can be kept in a file, sent over a socket and given to an application."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from urllib.parse import quote

from tools.fuzzing.mutations import NUMBERS, TEXTS, mutated, mutated_text

_METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "post", "")
_NAMES = ("content-type", "content-length", "accept", "x-request-id", "authorization", "expect", "content-encoding",
          "traceparent", "inference-header-content-length", "idempotency-key")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Request:
    """Header values and the target are Latin-1, without line ends."""

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes = b""

    @classmethod
    def json(cls, target: str, body: bytes) -> Request:
        return cls("POST", target, (("content-type", "application/json"),), body)

    def to_bytes(self) -> bytes:
        """With a Content-Length that fits, unless there is one that does not."""
        headers = self.headers
        if not any(name.lower() in ("content-length", "transfer-encoding") for name, _ in headers):
            headers = (*headers, ("content-length", str(len(self.body))))
        lines = [f"{self.method} {self.target} HTTP/1.1", *(f"{name}: {value}" for name, value in headers), "", ""]
        return "\r\n".join(lines).encode("latin-1", "replace") + self.body

    @classmethod
    def from_bytes(cls, data: bytes) -> Request:
        """What a lenient server would read: whatever is no header is left out."""
        head, _, body = data.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, _, rest = first.partition(" ")
        pairs = (line.partition(":") for line in lines if ":" in line)
        return cls(method, rest.rpartition(" ")[0] or "/", tuple((n, v.strip(" \t")) for n, _, v in pairs), body)


def mutated_request(random: Random, request: Request, headers: Sequence[str] = ()) -> Request:
    """Another method, target or header; the body stays. `headers` are names that mean something to the door."""
    kind = random.randrange(10)
    if kind == 0:
        return replace(request, method=random.choice(_METHODS))
    if kind == 1:
        target = mutated_text(random, request.target, TEXTS[:40])
        return replace(request, target="/" + quote(target[1:], safe="/%?=&:;@!$'()*+,~-._"))
    if kind == 2 and request.headers:
        gone = random.randrange(len(request.headers))
        return replace(request, headers=request.headers[:gone] + request.headers[gone + 1 :])
    names = (*(name for name, _ in request.headers), *headers)
    if kind < 5:
        return replace(request, headers=(*request.headers, (random.choice(_NAMES + names), _value(random, "1"))))
    if not request.headers:
        return request
    at = random.randrange(len(request.headers))
    name, value = request.headers[at]
    return replace(request, headers=(*request.headers[:at], (name, _value(random, value)), *request.headers[at + 1 :]))


def _value(random: Random, value: str) -> str:
    kind = random.randrange(4)
    if kind == 0:
        found = str(random.choice(NUMBERS))
    elif kind == 1:
        found = quote(random.choice(TEXTS).encode(errors="replace"), safe=" /:;,=\"'()%")
    elif kind == 2:
        found = mutated(random, value.encode("latin-1", "replace")).decode("latin-1")
    else:
        found = mutated_text(random, value, TEXTS[:40])
    # line ends and zeros end a header for every server, so no application sees them
    return "".join(sign for sign in found if sign not in "\r\n\x00")[:60_000]
