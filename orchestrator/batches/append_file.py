"""A file that grows by whole appends, and is cut back to what a journal says of it."""

from __future__ import annotations

import os
from pathlib import Path


class AppendFileError(Exception):
    """The file is not what the journal says; the text says what to do."""


class AppendFile:
    """`size_bytes` is what the journal knows: more is cut off, as a kill may leave half an append behind.

    Raises AppendFileError when the file is shorter, and OSError."""

    def __init__(self, path: Path, size_bytes: int) -> None:
        try:
            # one that is gone is not made anew, where something had been written
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | (0 if size_bytes else os.O_CREAT), 0o666)
        except FileNotFoundError:
            raise AppendFileError(f"{path} is gone, {size_bytes} bytes had been written") from None
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        found_bytes = os.fstat(descriptor).st_size
        if found_bytes < size_bytes:
            self._file.close()
            raise AppendFileError(
                f"{path} has {found_bytes} bytes, {size_bytes} had been written: it was changed since"
            )
        self._file.truncate(size_bytes)
        self._file.seek(size_bytes)
        self.size_bytes = size_bytes

    def append(self, data: bytes) -> None:
        """On the disk when it returns. After an OSError the file is as long as before, if the disk allows it."""
        view = memoryview(data)
        try:
            while view:
                view = view[self._file.write(view) :]
            os.fdatasync(self._file.fileno())
        except OSError:
            self._file.truncate(self.size_bytes)
            self._file.seek(self.size_bytes)
            raise
        self.size_bytes += len(data)

    def close(self) -> None:
        self._file.close()
