"""Reads an input file in chunks, with flat memory, and knows how far it came."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import BinaryIO

from orchestrator.batches.lines import LINE_BYTES_MAX, BadLine, Request, parse_line, too_long

CHUNK_REQUESTS = 256
CHUNK_LINES = 4096  # bad and blank ones as well
CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 1 << 20
_BOM = b"\xef\xbb\xbf"
NOTHING_READ = hashlib.sha256().hexdigest()


class InputChanged(Exception):
    """The input does not begin with what was read of it before."""


@dataclass(frozen=True, slots=True)
class Mark:
    """How far an input was read: bytes, lines, and the SHA-256 of these bytes in hexadecimal."""

    offset: int = 0
    line: int = 0
    digest: str = NOTHING_READ


@dataclass(frozen=True, slots=True)
class Chunk:
    """Some lines of the input, up to `end`. `model` is what all lines up to there are for; None: none was named yet."""

    requests: tuple[Request, ...]
    bad: tuple[BadLine, ...]
    end: Mark
    model: str | None


class InputReader:
    """Lines of `stream`. The first line that names a model decides for all, where `model` is None."""

    def __init__(self, stream: BinaryIO, model: str | None) -> None:
        self._stream = stream
        self._model = model
        self._offset = 0
        self._line = 0
        self._hash = hashlib.sha256()

    def skip_to(self, mark: Mark) -> None:
        """To be called first. Raises InputChanged unless the input begins with the bytes that led to `mark`."""
        left = mark.offset
        while left:
            block = self._stream.read(min(left, _BLOCK_BYTES))
            if not block:
                raise InputChanged(f"it ends after {mark.offset - left} bytes; {mark.offset} had been read of it")
            self._hash.update(block)
            left -= len(block)
        if self._hash.hexdigest() != mark.digest:
            raise InputChanged(f"its first {mark.offset} bytes, which had been read, are others now")
        self._offset, self._line = mark.offset, mark.line

    def chunk(self) -> Chunk | None:
        """The next lines; None at the end."""
        requests: list[Request] = []
        bad: list[BadLine] = []
        first_line, size_bytes = self._line, 0
        while len(requests) < CHUNK_REQUESTS and size_bytes < CHUNK_BYTES and self._line - first_line < CHUNK_LINES:
            raw = self._next()
            if raw is None:
                break
            parsed = self._parsed(raw)
            if isinstance(parsed, Request):
                self._model = parsed.model
                requests.append(parsed)
                size_bytes += len(parsed.line)
            elif parsed is not None:
                bad.append(parsed)
        if self._line == first_line:
            return None
        return Chunk(tuple(requests), tuple(bad), self._mark(), self._model)

    def _parsed(self, raw: bytes) -> Request | BadLine | None:
        """What the line says that was read last; None for a blank one. Other kinds of input read it otherwise."""
        return too_long(self._line) if len(raw) > LINE_BYTES_MAX else parse_line(self._line, raw, self._model)

    def _mark(self) -> Mark:
        return Mark(self._offset, self._line, self._hash.hexdigest())

    def _next(self) -> bytes | None:
        """The next line without its end; of one that is too long, a part that is too long. None at the end."""
        raw = part = self._stream.readline(LINE_BYTES_MAX + 2)
        while part:
            self._hash.update(part)
            self._offset += len(part)
            if part.endswith(b"\n"):
                break
            part = self._stream.readline(_BLOCK_BYTES)
        if not raw:
            return None
        self._line += 1
        return raw.removesuffix(b"\n").removesuffix(b"\r").removeprefix(_BOM if self._line == 1 else b"")
