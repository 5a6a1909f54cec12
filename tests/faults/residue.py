"""What is left of a run: sequences, memory, sockets, threads, tasks, processes."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import aiohttp
import psutil

from tests.faults.fleet import Fleet

EMPTY_S_MAX = 30.0  # after the last answer, all sequences must have been freed
RSS_GROWTH_BYTES_MAX = 64 << 20
_SOCKETS = 10  # that a run may leave open beyond those before it, for each replica: connections kept for later
_LOOK_EVERY_S = 0.1


@dataclass(frozen=True, slots=True)
class Usage:
    """Of the orchestrator, and of the stage's process that has most."""

    orchestrator_rss_bytes: int
    orchestrator_sockets: int
    orchestrator_threads: int
    orchestrator_tasks: int  # of asyncio; -1 where it does not tell
    stage_rss_bytes: int
    stage_sockets: int
    stage_threads: int


async def usage(fleet: Fleet) -> Usage:
    """As it is now; asks the orchestrator for its own figures."""
    assert fleet.orchestrator is not None
    orchestrator = psutil.Process(fleet.orchestrator.pid)
    stages = [psutil.Process(replica.process.pid) for replica in fleet.replicas if replica.process is not None]
    async with aiohttp.ClientSession() as session:
        tasks = _value(await _metrics(session, fleet.base_url), "stagecraft_tasks")
    return Usage(
        orchestrator.memory_info().rss,
        _sockets(orchestrator.pid),
        orchestrator.num_threads(),
        -1 if tasks is None else int(tasks),
        max(stage.memory_info().rss for stage in stages),
        max(_sockets(stage.pid) for stage in stages),
        max(stage.num_threads() for stage in stages),
    )


async def left_sequences(fleet: Fleet, patience_s: float) -> Mapping[str, int]:
    """Sequences that are still held after so long, by whom; empty when all have been freed."""
    deadline_s = asyncio.get_running_loop().time() + patience_s
    async with aiohttp.ClientSession() as session:
        while True:
            held = await _held(fleet, session)
            if not held or asyncio.get_running_loop().time() > deadline_s:
                return held
            await asyncio.sleep(_LOOK_EVERY_S)


async def _held(fleet: Fleet, session: aiohttp.ClientSession) -> dict[str, int]:
    held = {}
    for replica in fleet.replicas:
        text = await _metrics(session, f"http://127.0.0.1:{replica.stage_port}")
        held[replica.name] = int(_value(text, "stagecraft_stage_sequences") or 0)
        held[f"{replica.name} bytes"] = int(_value(text, "stagecraft_stage_kv_bytes") or 0)
    text = await _metrics(session, fleet.base_url)
    for name in ("stagecraft_sequences_running", "stagecraft_sequences_waiting", "stagecraft_requests_in_flight"):
        held[f"orchestrator {name}"] = int(_value(text, name) or 0)
    return {name: count for name, count in held.items() if count}


def complaints(before: Usage, after: Usage, held: Mapping[str, int], replicas: int) -> list[str]:
    """What a run has left behind that it should not have."""
    found = [f"left behind: {name}: {count}" for name, count in held.items()]
    for who in ("orchestrator", "stage"):
        old, new = getattr(before, f"{who}_rss_bytes"), getattr(after, f"{who}_rss_bytes")
        if new > old + RSS_GROWTH_BYTES_MAX:
            found.append(f"memory of the {who} went from {old >> 20} to {new >> 20} MiB")
        for what, slack in (("sockets", _SOCKETS * replicas), ("threads", 8)):
            old, new = getattr(before, f"{who}_{what}"), getattr(after, f"{who}_{what}")
            if new > old + slack:
                found.append(f"{what} of the {who} went from {old} to {new}")
    if after.orchestrator_tasks > before.orchestrator_tasks + 2 >= 2:
        found.append(f"tasks of the orchestrator went from {before.orchestrator_tasks} to {after.orchestrator_tasks}")
    return found


def _sockets(pid: int) -> int:
    """Of any kind, from proc(5)."""
    count = 0
    for fd in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # closed in this moment
            count += os.readlink(fd).startswith("socket:")
    return count


def children() -> set[int]:
    """Pids of all processes below this one."""
    return {child.pid for child in psutil.Process(os.getpid()).children(recursive=True)}


async def _metrics(session: aiohttp.ClientSession, url: str) -> str:
    async with session.get(f"{url}/metrics") as reply:
        return await reply.text()


def _value(text: str, name: str) -> float | None:
    """The sum of a metric over its labels; None if it is not there."""
    values = [
        float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name) and line[len(name)] in " {"
    ]
    return sum(values) if values else None
