"""Many inputs for one door, in a process of its own that is watched: it may die or hang, and its memory may grow.

An input is a function of (seed, door, index), so any part of a run can be repeated. Before an input is given to the
door it is written to a file that the watching process can read, whatever becomes of the other.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import logging
import math
import mmap
import multiprocessing
import os
import statistics
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any

import psutil
import structlog

from tools.fuzzing.door import Door, Violation
from tools.fuzzing.mutations import INPUT_BYTES_MAX

POLL_S = 0.5
START_S_MAX = 600.0  # for a door to open: on a busy machine importing torch takes long
_HEAD = struct.Struct("<qq")  # index of the input, its length
_FILE_BYTES = 8 << 20  # longer inputs are kept cut
_SAMPLES = 40  # of memory, in the course of a run
_KEPT_PER_CAUSE = 3  # findings that look alike


@dataclass(frozen=True, slots=True)
class Task:
    """What one process does: inputs `start` <= index < `end` of a door."""

    door: str
    seed: int
    start: int
    end: int
    check_every: int
    cpu_s_max: float  # of one input; more is a hang
    seconds_max: float = math.inf  # after which the rest is left out


@dataclass(frozen=True, slots=True)
class Finding:
    """`kind` is crash, 5xx, harm or hang; `cause` is equal for findings that look alike."""

    door: str
    kind: str
    index: int
    cause: str
    text: str
    data: bytes


@dataclass(slots=True)
class Tally:
    """What became of a door's inputs."""

    door: str
    inputs: int = 0
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0
    slowest_cpu_s: float = 0.0
    rss_bytes: list[tuple[int, int]] = field(default_factory=list)  # (inputs so far in this process, bytes)
    findings: list[Finding] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)  # findings by kind, those that were not kept too

    def count(self, kind: str) -> int:
        return self.counts.get(kind, 0)

    @property
    def growth_bytes(self) -> float | None:
        """Memory per 100,000 inputs, from the second quarter of the run to the last; None for runs too short to say."""
        if len(self.rss_bytes) < 8:
            return None
        quarter = len(self.rss_bytes) // 4
        early, late = self.rss_bytes[quarter : 2 * quarter], self.rss_bytes[-quarter:]
        inputs = _middle(late, 0) - _middle(early, 0)
        return (_middle(late, 1) - _middle(early, 1)) * 100_000 / max(1, inputs)


def run(
    task: Task, open_door: Callable[[str, Path], Door], told: Callable[[Tally], None] = lambda tally: None
) -> Tally:
    """All inputs of the task, in as many processes as it takes. `told` is called now and then."""
    tally = Tally(task.door)
    start = task.start
    while start < task.end:
        start = _watched(Task(**{**_facts(task), "start": start}), open_door, tally, told)
    return tally


def replay(door: Door, data: bytes) -> str:
    """What the door does with one input: the verdict, or the trace of what went wrong."""
    try:
        verdict = door.take(data)
        door.check()
        return verdict
    except Exception:
        return traceback.format_exc()


def input_of(door: Door, name: str, seed: int, index: int) -> bytes:
    """`name` is what the catalogue calls the door. Drawn again where it is longer than INPUT_BYTES_MAX."""
    random = Random(f"{seed}/{name}/{index}")
    while len(data := door.make(random)) > INPUT_BYTES_MAX:
        pass
    return data


def _watched(task: Task, open_door: Callable[[str, Path], Door], tally: Tally, told: Callable[[Tally], None]) -> int:
    """Runs a process until its end. Returns the index that is to come next."""
    context = multiprocessing.get_context("spawn")
    begun_s = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=_memory_folder()) as folder:
        current = Path(folder) / "input"
        current.write_bytes(bytes(_HEAD.size))
        with current.open("r+b") as file:
            file.truncate(_FILE_BYTES)
            _HEAD.pack_into(view := mmap.mmap(file.fileno(), _FILE_BYTES), 0, -1, 0)
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(task, open_door, Path(folder), theirs), daemon=False)
        process.start()
        theirs.close()
        before = tally.inputs
        try:
            return _follow(process, ours, view, task, tally, Path(folder), told)
        finally:
            process.kill()
            process.join()
            tally.seconds += time.monotonic() - begun_s
            view.close()
            ours.close()
            assert tally.inputs >= before


def _follow(
    process: Any,
    pipe: Connection,
    view: mmap.mmap,
    task: Task,
    tally: Tally,
    folder: Path,
    told: Callable[[Tally], None],
) -> int:
    base, accepted, refused = tally.inputs, tally.accepted, tally.refused
    index, since_cpu_s, since_s = -1, 0.0, time.monotonic()
    while True:
        alive = process.is_alive()
        while pipe.poll(POLL_S if alive else 0):
            try:
                message = pipe.recv()
            except EOFError:
                break
            if isinstance(message, Finding):
                _file(tally, message)
                continue
            done, took, slow_s, rss, ended = message
            tally.inputs, tally.accepted, tally.refused = base + done, accepted + took, refused + done - took
            tally.slowest_cpu_s = max(tally.slowest_cpu_s, slow_s)
            tally.rss_bytes.append((tally.inputs, rss))
            told(tally)
            if ended:
                process.join(30)
                return task.end
        now, size = _HEAD.unpack_from(view)
        cpu_s = _cpu_s(process.pid) if alive else 0.0
        if now != index:
            index, since_cpu_s, since_s = now, cpu_s, time.monotonic()
        over = cpu_s - since_cpu_s > task.cpu_s_max or time.monotonic() - since_s > 10 * task.cpu_s_max
        if index < 0:
            over = time.monotonic() - since_s > START_S_MAX
        if alive and not over:
            continue
        kind = "hang" if alive else "crash"
        where = _trace_of(process, folder) if alive else f"the process ended with {process.exitcode}"
        if index < 0:
            raise RuntimeError(f"the door {task.door} did not open: {where}")
        data = view[_HEAD.size : _HEAD.size + min(size, _FILE_BYTES - _HEAD.size)]
        _file(tally, Finding(task.door, kind, index, where[-200:], where, bytes(data)))
        tally.inputs = base + index + 1 - task.start
        return index + 1


def _file(tally: Tally, finding: Finding) -> None:
    tally.counts[finding.kind] = tally.counts.get(finding.kind, 0) + 1
    alike = [one for one in tally.findings if (one.kind, one.cause) == (finding.kind, finding.cause)]
    if len(alike) < _KEPT_PER_CAUSE:
        tally.findings.append(finding)


def _work(task: Task, open_door: Callable[[str, Path], Door], folder: Path, pipe: Connection) -> None:
    """The process: opens the door and gives it one input after another."""
    faulthandler.enable(open(folder / "trace", "w"))  # noqa: SIM115 (open as long as the process lives)
    silence()
    door = open_door(task.door, folder)
    process = psutil.Process()
    with (folder / "input").open("r+b") as file:
        view = mmap.mmap(file.fileno(), _FILE_BYTES)
    accepted, slowest_s = 0, 0.0
    every = max(1, min((task.end - task.start) // _SAMPLES, 20_000))
    begun_s = told_s = time.monotonic()
    done = 0
    for index in range(task.start, task.end):
        if told_s - begun_s > task.seconds_max:
            break
        done = index + 1 - task.start
        data = b""
        before_s = time.process_time()
        try:
            data = input_of(door, task.door, task.seed, index)  # a fault in here is found like one of the door
            kept = data[: _FILE_BYTES - _HEAD.size]
            view[_HEAD.size : _HEAD.size + len(kept)] = kept
            _HEAD.pack_into(view, 0, index, len(kept))
            accepted += door.take(data) == "accepted"
            if done % task.check_every == 0 or index + 1 == task.end:
                door.check()
        except Exception as error:
            pipe.send(_finding(task.door, index, data, error))
        slowest_s = max(slowest_s, time.process_time() - before_s)
        if done % every == 0 or time.monotonic() - told_s > min(30.0, task.seconds_max / _SAMPLES):
            told_s = time.monotonic()
            pipe.send((done, accepted, slowest_s, _held_bytes(process), False))
    _HEAD.pack_into(view, 0, task.end, 0)
    door.close()
    pipe.send((done, accepted, slowest_s, _held_bytes(process), True))


def _held_bytes(process: psutil.Process) -> int:
    """Memory without what is free already: inputs of a megabyte leave holes of a megabyte."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        trim(0)
    return int(process.memory_info().rss)


def _finding(door: str, index: int, data: bytes, error: Exception) -> Finding:
    kind = error.kind if isinstance(error, Violation) else "crash"
    frames = traceback.extract_tb(error.__traceback__)
    at = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
    cause = str(error)[:60] if isinstance(error, Violation) else f"{type(error).__name__} at {at}"
    return Finding(door, kind, index, cause, "".join(traceback.format_exception(error)), data)


def silence() -> None:
    """A million refusals are a million lines in a log."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    logging.disable(logging.CRITICAL)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ["RUST_BACKTRACE"] = "0"  # a panic in tokenizers would read debug symbols, 50 MiB, and print fifty lines
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")


def _trace_of(process: Any, folder: Path) -> str:
    """Where a process that hangs is, as faulthandler writes it when the process is aborted."""
    os.kill(process.pid, 6)
    process.join(10)
    trace = folder / "trace"
    return trace.read_text(errors="replace")[-20_000:] if trace.exists() else "no trace"


def _cpu_s(pid: int) -> float:
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return 0.0
    return float(times.user + times.system)


def _memory_folder() -> str | None:
    return "/dev/shm" if os.path.isdir("/dev/shm") else None


def _middle(samples: Sequence[tuple[int, int]], column: int) -> float:
    return float(statistics.median(sample[column] for sample in samples))


def _facts(task: Task) -> dict[str, Any]:
    return {name: getattr(task, name) for name in task.__dataclass_fields__}
