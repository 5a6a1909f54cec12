"""What Stagecraft is compared with, each in a process of its own that never outlives this one."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from benchmarks import tether
from benchmarks.bench import ROOT, MeasureError, child_environment

GRACE_S = 10.0  # `stagecraft up` stops its own processes meanwhile
LINE_BYTES_MAX = 16 << 20
LOG_CHARS_SHOWN = 2000


@dataclass(frozen=True, slots=True)
class Generated:
    """Answer of `generate`: tokens [sequences][new tokens], and when each step's came, in seconds from the call on."""

    tokens: list[list[int]]
    stamps_s: list[float]


class TransformersPeer:
    """Transformers' `generate` on the whole model."""

    def __init__(self, program: Program) -> None:
        self._program = program

    async def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> Generated:
        """Greedy, as one batch; shorter prompts are padded on the left. Timed inside the process, so the pipe costs it
        nothing."""
        await self._program.write_line({"prompts": [list(prompt) for prompt in prompts], "new_tokens": new_tokens})
        return Generated(**await self._program.read_line())


@asynccontextmanager
async def transformers_peer(model: Path, threads: int) -> AsyncIterator[TransformersPeer]:
    """Usable at once; the first answer comes after Transformers is imported and the model is loaded."""
    async with program(["benchmarks.peer_generate", str(model)], threads) as running:
        yield TransformersPeer(running)


@asynccontextmanager
async def echo_peer() -> AsyncIterator[str]:
    """URL of a bare ASGI app that answers with the bytes it got."""
    async with program(["benchmarks.peer_echo"], 1) as running:
        answer = await running.read_line()
        yield f"http://127.0.0.1:{answer['port']}/"


class Program:
    """A Python module that runs as a process and speaks JSON lines on its standard input and output."""

    def __init__(self, name: str, process: asyncio.subprocess.Process, log: Path | None = None) -> None:
        self._name = name
        self._process = process
        self._log = log

    @property
    def pid(self) -> int:
        return self._process.pid

    async def check(self) -> None:
        """Raises MeasureError when the process has ended."""
        if self._process.returncode is not None:
            await self._raise_ended()

    async def write_line(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None  # a pipe, see `program`
        self._process.stdin.write(json.dumps(message).encode() + b"\n")
        await self._process.stdin.drain()

    async def read_line(self) -> dict[str, Any]:
        """Raises MeasureError when the process ends instead."""
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self._raise_ended()
        message: dict[str, Any] = json.loads(line)
        return message

    async def _raise_ended(self) -> NoReturn:
        code = await self._process.wait()
        printed = "what it printed is above" if self._log is None else self._log.read_text()[-LOG_CHARS_SHOWN:]
        raise MeasureError(f"`python -m {self._name}` ended with exit code {code}; {printed}")


@asynccontextmanager
async def program(
    arguments: Sequence[str], threads: int, env: Mapping[str, str] | None = None, log: Path | None = None
) -> AsyncIterator[Program]:
    """`python -m ARGUMENTS` with `env` added to its environment; it ends with the context, or with this process.

    What it prints on standard error goes to `log`, or where ours goes."""
    argv = [sys.executable, "-I", "-S", tether.__file__, str(os.getpid()), sys.executable, "-m", *arguments]
    with nullcontext() if log is None else log.open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            *argv,
            env={**child_environment(threads), **(env or {})},
            cwd=ROOT,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=stderr,
            limit=LINE_BYTES_MAX,
            start_new_session=True,  # Ctrl-C is for us to handle
        )
    try:
        yield Program(arguments[0], process, log)
    finally:
        await _end(process)


async def _end(process: asyncio.subprocess.Process) -> None:
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), GRACE_S)
    except TimeoutError:
        pass
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
