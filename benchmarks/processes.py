"""Child processes that never outlive this one, each with a log file for all it prints."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks import tether

LAST_LINES = 12
TAIL_BYTES = 16 << 10


class Child:
    """A running child process. Its standard output and error go to `log`."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path) -> None:
        self.name = name
        self.log = log
        self._process = process

    @classmethod
    async def start(
        cls, name: str, argv: Sequence[str], *, env: Mapping[str, str], log: Path, pass_fds: Sequence[int] = ()
    ) -> Child:
        """Starts `argv` (the program by its full path) in a session of its own, so that Ctrl-C reaches only us.

        Call it on the main thread: Linux ends a tied child with the thread that started it. Raises OSError."""
        tied = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), *argv]
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *tied,
                env=dict(env),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=pass_fds,
                start_new_session=True,
            )
        return cls(name, process, log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs; minus the signal's number when a signal ended it."""
        return self._process.returncode

    async def wait(self) -> int:
        """The exit code, once it has ended."""
        return await self._process.wait()

    def send(self, number: signal.Signals) -> None:
        """Signals the child and whatever it started; no error when it has ended."""
        if self.exit_code is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def last_lines(self, count: int = LAST_LINES) -> list[str]:
        """The end of what it printed."""
        with self.log.open("rb") as stream:
            stream.seek(max(0, self.log.stat().st_size - TAIL_BYTES))
            return stream.read().decode(errors="replace").rstrip().splitlines()[-count:]

    def how_it_ended(self) -> str:
        """For people: 'ended with exit code 1', 'was killed by SIGKILL'."""
        code = self.exit_code
        if code is None:
            return "still runs"
        if code >= 0:
            return f"ended with exit code {code}"
        hint = " (often: out of memory)" if code == -signal.SIGKILL else ""
        return f"was killed by {signal.Signals(-code).name}{hint}"


async def stop(children: Sequence[Child], grace_s: float) -> None:
    """Ends the children: SIGTERM, then SIGKILL for those that run on after `grace_s`, or at once when cancelled."""
    for child in children:
        child.send(signal.SIGTERM)
    ends = [asyncio.ensure_future(child.wait()) for child in children]
    try:
        if ends:
            await asyncio.wait(ends, timeout=grace_s)
    finally:
        for child in children:
            child.send(signal.SIGKILL)
    await asyncio.gather(*ends)
