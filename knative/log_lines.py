"""Lines of the replicas' logs, each behind the name of its pod, as `kubectl logs --prefix` shows them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, Callable, Sequence
from io import BytesIO
from pathlib import Path
from typing import Protocol

from knative.errors import NotFound

POLL_S = 0.2
CHUNK_BYTES = 64 << 10
LINE_BYTES_MAX = 1 << 20  # a longer one comes in pieces


class LogFile(Protocol):
    """What one process of a replica printed; `restart` counts the processes of the pod from 0."""

    @property
    def pod(self) -> str: ...
    @property
    def restart(self) -> int: ...
    @property
    def path(self) -> Path: ...


async def log_lines(
    files: Callable[[], Sequence[LogFile]], *, follow: bool = False, previous: bool = False, tail: int | None = None
) -> AsyncGenerator[bytes]:
    """Whole lines, several at a time; with `follow` empty bytes whenever there is nothing new, and no end until
    `files` raises NotFound.

    Of each pod the newest process, or with `previous` the one before it. `tail` lines of each, by default all.
    Raises NotFound at once, when no process was restarted."""
    chosen = _of_interest(files(), previous)
    readers = {_key(file): _Reader(file, _tail_offset(file.path, tail)) for file in chosen}
    growing = set(readers) if follow and not previous else None  # None: nothing is to come
    while True:
        for key in list(readers):
            while data := readers[key].read():
                yield data
            if growing is None or key not in growing:
                yield readers.pop(key).rest()
        if growing is None:
            return
        yield b""
        await asyncio.sleep(POLL_S)
        try:
            current = {_key(file): file for file in _of_interest(files(), previous=False)}
            readers |= {key: _Reader(file) for key, file in current.items() if key not in readers}
            growing = set(current)
        except NotFound:
            growing = None


class _Reader:
    """Reads a growing file on from `offset`, without keeping it open."""

    def __init__(self, file: LogFile, offset: int = 0) -> None:
        self._path = file.path
        self._prefix = f"[{file.pod}] ".encode()
        self._offset = offset
        self._partial = b""

    def read(self) -> bytes:
        """Some whole lines that have come since; empty if none has."""
        while data := self._chunk():
            whole, end, rest = (self._partial + data).rpartition(b"\n")
            if not end and len(rest) >= LINE_BYTES_MAX:
                whole, end, rest = rest, b"\n", b""
            self._partial = rest
            if end:
                return self._marked(whole + end)
        return b""

    def rest(self) -> bytes:
        """The beginning of a line that never came to its end."""
        partial, self._partial = self._partial, b""
        return self._marked(partial + b"\n" if partial else b"")

    def _chunk(self) -> bytes:
        try:
            with self._path.open("rb") as stream:
                if os.fstat(stream.fileno()).st_size < self._offset:
                    self._offset = 0  # begun anew
                stream.seek(self._offset)
                data = stream.read(CHUNK_BYTES)
        except FileNotFoundError:
            return b""
        self._offset += len(data)
        return data

    def _marked(self, lines: bytes) -> bytes:
        return b"".join(self._prefix + line for line in _split(lines))


def _of_interest(files: Sequence[LogFile], previous: bool) -> list[LogFile]:
    """The newest file of each pod, or the one before it."""
    back = 1 if previous else 0
    by_pod: dict[str, list[LogFile]] = {}
    for file in sorted(files, key=lambda file: file.restart):
        by_pod.setdefault(file.pod, []).append(file)
    if previous and all(len(found) < 2 for found in by_pod.values()):
        raise NotFound("no earlier process: none has been restarted; leave out --previous")
    return [found[-1 - back] for found in by_pod.values() if len(found) > back]


def _split(text: bytes) -> list[bytes]:
    """Lines with their ends; unlike `splitlines`, a carriage return of a progress bar ends none."""
    return BytesIO(text).readlines()


def _key(file: LogFile) -> tuple[str, int]:
    return file.pod, file.restart


def _tail_offset(path: Path, lines: int | None) -> int:
    """Where the last `lines` lines begin."""
    if lines is None or not path.exists():
        return 0
    with path.open("rb") as stream:
        offset = stream.seek(0, os.SEEK_END)
        text = b""
        # one line end more than lines: the one before the first of them
        while offset > 0 and text.removesuffix(b"\n").count(b"\n") < lines:
            step = min(CHUNK_BYTES, offset)
            offset -= step
            stream.seek(offset)
            text = stream.read(step) + text
    wanted = _split(text)[-lines:] if lines else []
    return offset + len(text) - sum(map(len, wanted))
