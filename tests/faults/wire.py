"""HTTP/1.1 messages as the bytes that they are, so that each of them can be spoilt. Spec: RFC 9112.

Bodies with Content-Length and chunked ones are read, which is all that stages, queue-proxies and their clients send.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, replace

from functions.contract.frames import unpack

_LINE_BYTES_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Message:
    """A request or a reply. `head` ends with its empty line; `body` is as it was sent, chunk sizes and all."""

    head: bytes
    body: bytes

    def header(self, name: str) -> str:
        """Its value; "" where it is missing."""
        for line in self.head.split(b"\r\n")[1:]:
            found, _, value = line.partition(b":")
            if found.strip().lower() == name.encode():
                return value.strip().decode("latin-1")
        return ""

    @property
    def method(self) -> str:
        return self.head.split(b" ", 1)[0].decode("latin-1")

    @property
    def status(self) -> int:
        """Of a reply."""
        return int(self.head.split(b" ", 2)[1])

    def to_bytes(self) -> bytes:
        return self.head + self.body


async def read_message(reader: asyncio.StreamReader) -> Message | None:
    """The next one; None if the connection ended before it began. Raises OSError and EOFError for one that is cut off,
    and ValueError for what is no HTTP."""
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial:
            raise
        return None
    except asyncio.LimitOverrunError:
        raise ValueError("headers without an end") from None
    message = Message(head, b"")
    if "chunked" in message.header("transfer-encoding").lower():
        return replace(message, body=await _read_chunks(reader))
    length = message.header("content-length") or "0"
    if not length.isdecimal():
        raise ValueError(f"content-length is {length!r}")
    return replace(message, body=await reader.readexactly(int(length)))


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    parts = []
    while True:
        line = await reader.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        parts += [line, await reader.readexactly(size + 2)]
        if size == 0:
            return b"".join(parts)


def page(status: int, text: str) -> Message:
    """A reply of our own."""
    reason = {200: "OK", 502: "Bad Gateway", 503: "Service Unavailable"}.get(status, "Other")
    body = text.encode()
    head = f"HTTP/1.1 {status} {reason}\r\ncontent-type: text/plain\r\ncontent-length: {len(body)}\r\n\r\n"
    return Message(head.encode(), body)


def flipped(data: bytes, salt: int) -> bytes:
    """One to three bits of it turned over, never to what it was. Nothing of nothing."""
    if not data:
        return data
    chance = random.Random(salt)
    spoilt = bytearray(data)
    for bit in chance.sample(range(len(data) * 8), min(chance.randint(1, 3), len(data) * 8)):
        spoilt[bit // 8] ^= 1 << bit % 8
    return bytes(spoilt)


def step_tokens(message: Message) -> int:
    """Tokens of a step event; 0 for what cannot be read as one."""
    try:
        return int(unpack(message.body).arrays["tokens"].shape[0])
    except (ValueError, KeyError, IndexError):
        return 0
