"""Cores that several stages of one machine share: one of them computes at a time, with all threads.

Threads of two stages that compute at once on the same cores wait for each other at every product, and whoever waits for
a thread that does not run loses whole time slices. Taking turns is faster. The turn is a lock on a file, which the
kernel takes back from a process that dies.
"""

from __future__ import annotations

import fcntl
import os
import time

_LOOK_EVERY_S = 0.0002
_WAIT_MAX_S = 10.0  # for one that is stopped or hangs while it holds the lock


class Cores:
    """A context: within it, no other process with the same `path` is. Without a path it does nothing."""

    def __init__(self, path: str) -> None:
        """Raises OSError where the file cannot be opened."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600) if path else None

    def __enter__(self) -> None:
        if self._file is None:
            return
        late_s = time.monotonic() + _WAIT_MAX_S
        while not self._try_lock(self._file) and time.monotonic() < late_s:
            time.sleep(_LOOK_EVERY_S)

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            fcntl.flock(self._file, fcntl.LOCK_UN)

    @staticmethod
    def _try_lock(file: int) -> bool:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
