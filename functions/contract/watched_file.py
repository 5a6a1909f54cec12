"""A small file that is read again when it changes: a mounted Secret is a symbolic link that is switched to a new one.

What it holds may be secret, so neither errors nor logs quote it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Generic, TypeVar

import structlog

_LOOK_EVERY_S = 1.0
_BYTES_MAX = 1 << 20

T = TypeVar("T")

log = structlog.get_logger()


class FileError(Exception):
    """The file cannot be read or used; the text names it and says what is expected, never what it holds."""


class WatchedFile(Generic[T]):
    """`value` is what `parse` makes of the file's content; `parse` raises ValueError, whose text may be shown."""

    def __init__(self, path: Path, parse: Callable[[bytes], T], look_every_s: float = _LOOK_EVERY_S) -> None:
        """Raises FileError."""
        self._path = path
        self._parse = parse
        self._look_every_s = look_every_s
        self._seen = self._stamp()
        self._value = self._read()
        self._looked_s = time.monotonic()

    @property
    def value(self) -> T:
        """As the file is now, or was a second ago. One that has become unusable leaves the old value in force."""
        now_s = time.monotonic()
        if now_s - self._looked_s >= self._look_every_s:
            self._looked_s = now_s
            self._look()
        return self._value

    def _look(self) -> None:
        try:
            stamp = self._stamp()
            if stamp == self._seen:
                return
            self._seen = stamp
            self._value = self._read()
            log.info("file_read_again", file=str(self._path))
        except FileError as error:
            log.warning("file_not_read_again", error=str(error))

    def _stamp(self) -> tuple[int, ...]:
        """Changes whenever the file does, and when a link leads to another one."""
        try:
            found = self._path.stat()
        except OSError as error:
            raise FileError(f"{self._path} cannot be read: {error.strerror or error}") from None
        return found.st_dev, found.st_ino, found.st_mtime_ns, found.st_size

    def _read(self) -> T:
        try:
            with self._path.open("rb") as stream:
                content = stream.read(_BYTES_MAX + 1)
        except OSError as error:
            raise FileError(f"{self._path} cannot be read: {error.strerror or error}") from None
        if len(content) > _BYTES_MAX:
            raise FileError(f"{self._path} has more than {_BYTES_MAX} bytes; a file of keys is small")
        try:
            return self._parse(content)
        except ValueError as error:
            raise FileError(f"{self._path}: {error}") from None


def key_lines(content: bytes) -> list[tuple[int, str]]:
    """(number, text) of the lines that are neither empty nor a comment (#). Raises ValueError for what is no text."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8; write one key a line, such as `openssl rand -hex 32` prints") from None
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]
