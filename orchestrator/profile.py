"""Measures the stages of a plan on the present hardware: each in a process of its own, one after another, by events.

A stage needs no neighbours for that: the first gets random tokens, the others random hidden states of the type and
width they report. What counts is the time that the stage itself states in its reply (`computeus`), so the way there and
back is not in it (`Workload.hop_s` of targets.py is for that).
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from datetime import date
from itertools import count
from pathlib import Path
from statistics import median

import aiohttp
import numpy as np
import psutil

from functions.contract.errors import StageError
from functions.contract.frames import Frame
from functions.contract.messages import KV_PAGE_TOKENS, Opening, Slice, StageInfo, Step, encode_sequences
from functions.contract.sampling import SamplingParams
from orchestrator.cost import StageProfile, Timings
from orchestrator.plan import Plan
from orchestrator.stage_client import StageClient, StageUnreachable

CONTEXT_TOKENS = 256  # before each decoded token; fewer where positions or KV memory end sooner
WARM_UPS = 2
LOAD_TIMEOUT_S = 3600.0
STEP_TIMEOUT_S = 600.0
_END_TIMEOUT_S = 10.0
_ROOT = Path(__file__).parents[1]
_SEED = 0

Tell = Callable[[int, str, float], None]


class ProfileError(Exception):
    """A stage could not be measured; the text says which and why."""


@dataclass(frozen=True, slots=True)
class ProfileOptions:
    """What is measured, and how. `widths` are sequences of a decode step, `prefill` tokens of a prompt's step."""

    device: str = "auto"
    dtype: str = "auto"
    threads: int = 0  # 0: torch decides
    widths: tuple[int, ...] = (1, 8, 32, 64)
    prefill: tuple[int, ...] = (128, 512)
    repeat: int = 5


async def profile_stages(plan: Plan, location: str, options: ProfileOptions, tell: Tell) -> tuple[StageProfile, ...]:
    """The profiles of all stages of a model at `location` (a folder or URL), measured one after another.

    `tell(stage, what is being done, part of the stage that is done)` is called on the way. Raises ProfileError."""
    return tuple([await _profile_stage(plan, index, location, options, tell) for index in range(len(plan.stages))])


async def _profile_stage(plan: Plan, index: int, location: str, options: ProfileOptions, tell: Tell) -> StageProfile:
    tell(index, "loading", 0.0)
    started_s = time.perf_counter()
    with _stage_process(_environment(plan, index, location, options)) as stage:
        try:
            async with _client(stage.url, index, plan.digest) as client:
                info = await client.wake(LOAD_TIMEOUT_S)
                load_s = time.perf_counter() - started_s
                bench = _Bench(client, info, options, lambda what, part: tell(index, what, part))
                decode_s, prefill_s = await bench.decode(), await bench.prefill()
        except StageUnreachable as error:
            raise ProfileError(f"stage {index}: {stage.last_words() or error}") from None
        except StageError as error:
            raise ProfileError(f"stage {index}: {error}") from None
        return StageProfile(
            device=_device_text(info.device, options.threads),
            dtype=info.dtype if plan.quantize == "none" else f"{info.dtype}, {plan.quantize} weights",
            measured=date.today().isoformat(),
            load_s=_rounded(load_s),
            decode_s=decode_s,
            prefill_s=prefill_s,
            memory_bytes=stage.memory_bytes(),
            device_memory_bytes=_device_memory_bytes(stage.pid) if info.device.startswith("cuda") else 0,
        )


class _Bench:
    """Sends steps to a stage that is awake and keeps the times it states."""

    def __init__(
        self, client: StageClient, info: StageInfo, options: ProfileOptions, tell: Callable[[str, float], None]
    ) -> None:
        self._client = client
        self._info = info
        self._options = options
        self._tell = tell
        self._random = np.random.default_rng(_SEED)
        self._parts = len(options.widths) + len(options.prefill) + 2  # loading and contexts are one each
        self._done = count(1)

    async def decode(self) -> Timings:
        """Steps of one token for so many sequences, all with the same context. Raises ProfileError."""
        widest = max(self._options.widths)
        context = self._context(widest)
        sequences = range(1, widest + 1)
        self._next(f"contexts of {widest} x {context} tokens")
        for sequence in sequences:
            await self._step([Slice(sequence, 0, context)])
        timings = []
        for width in self._options.widths:
            self._next(f"decode, {width} at once")
            slices = [Slice(sequence, context, 1) for sequence in sequences[:width]]
            timings.append((width, await self._median(slices)))
        await self._release(sequences)
        return tuple(timings)

    async def prefill(self) -> Timings:
        """Steps with so many tokens of one prompt, cut to what the model and its KV memory take."""
        most = min(self._info.max_positions, _room(self._info.kv_tokens_free))
        timings = []
        for tokens in sorted({min(tokens, most) for tokens in self._options.prefill}):
            self._next(f"prefill, {tokens} tokens")
            timings.append((tokens, await self._median([Slice(1, 0, tokens)])))
        await self._release(range(1, 2))
        return tuple(timings)

    def _next(self, what: str) -> None:
        self._tell(what, next(self._done) / self._parts)

    def _context(self, width: int) -> int:
        room = _room(self._info.kv_tokens_free // width)
        context = min(CONTEXT_TOKENS, self._info.max_positions - 1, room - 1)
        if context < 1:
            raise ProfileError(
                f"stage {self._info.stage}: its KV memory has no room for {width} sequences; give smaller --widths, or "
                "free some memory"
            )
        return context

    async def _median(self, slices: list[Slice]) -> float:
        """A step may start anew before what is cached: every repetition is the same."""
        for _ in range(WARM_UPS):
            await self._step(slices)
        return _rounded(median([await self._step(slices) for _ in range(self._options.repeat)]))

    async def _step(self, slices: list[Slice]) -> float:
        """Seconds of the computation."""
        tokens = sum(piece.length for piece in slices)
        ids = self._random.integers(0, self._info.vocab_size, tokens, dtype=np.int32)
        openings = {piece.sequence: Opening(SamplingParams(), piece.length) for piece in slices if piece.start == 0}
        step = Step(tuple(slices), ids, self._hidden(tokens), openings)
        reply = await self._client.step(b"".join(step.to_body()), "profile", None, STEP_TIMEOUT_S)
        return max(1, int(reply.extensions["computeus"])) / 1e6

    def _hidden(self, tokens: int) -> Frame | None:
        """Random hidden states, for all but the first stage."""
        if self._info.stage == 0:
            return None
        return hidden_frame(
            self._random.standard_normal((tokens, self._info.hidden_size), np.float32), self._info.dtype
        )

    async def _release(self, sequences: range) -> None:
        await self._client.release(encode_sequences(sequences), None, STEP_TIMEOUT_S)


def hidden_frame(values: np.ndarray[tuple[int, int], np.dtype[np.float32]], dtype: str) -> Frame:
    """float32 values as a stage of `dtype` takes them; bfloat16, which numpy lacks, is their upper half (cut off)."""
    if dtype == "bfloat16":
        upper = (values.view(np.uint32) >> 16).astype("<u2")
        return Frame("BF16", values.shape, upper.tobytes())
    if dtype == "float16":
        return Frame.of(values.astype(np.float16))
    return Frame.of(values)


def _room(tokens: int) -> int:
    """How long one sequence may grow in memory of `tokens`, which is handed out in whole pages."""
    return tokens // KV_PAGE_TOKENS * KV_PAGE_TOKENS


class _StageProcess:
    def __init__(self, process: subprocess.Popen[bytes], url: str, log: Path) -> None:
        self.url = url
        self.pid = process.pid
        self._process = process
        self._log = log

    def last_words(self) -> str:
        """Why the process ended, by the last line of its log; empty while it runs."""
        try:
            code = self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return ""
        if code < 0:
            return f"its process was killed by {signal.Signals(-code).name}; was there too little memory?"
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        return (
            f"its process ended with code {code}: {lines[-1].removeprefix('error: ') if lines else 'it said nothing'}"
        )

    def memory_bytes(self) -> int:
        """The peak of the host's memory that the process had; on systems other than Linux what it has now."""
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
                if line.startswith("VmHWM:"):
                    return int(line.split()[1]) * 1024
        return int(psutil.Process(self.pid).memory_info().rss)


@contextmanager
def _stage_process(environment: dict[str, str]) -> Iterator[_StageProcess]:
    """A stage that listens from the start: what is sent while it loads waits in the socket. Ended at the end."""
    with tempfile.TemporaryDirectory(prefix="stagecraft-profile-") as folder:
        log = Path(folder) / "stage.log"
        with socket.create_server(("127.0.0.1", 0)) as listener, log.open("wb") as stream:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "functions", "--fd", str(listener.fileno())],
                env=environment,
                pass_fds=(listener.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=stream,
                start_new_session=True,  # Ctrl-C is for us; we end it
            )
        try:
            yield _StageProcess(process, url, log)
        finally:
            process.terminate()
            try:
                process.wait(_END_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@asynccontextmanager
async def _client(url: str, index: int, digest: str) -> AsyncIterator[StageClient]:
    async with aiohttp.ClientSession() as session:
        client = StageClient(session, index, url, digest)
        try:
            yield client
        finally:
            client.close()


def _environment(plan: Plan, index: int, location: str, options: ProfileOptions) -> dict[str, str]:
    """Ours without the settings of another stage, and this one's."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("STAGE_")}
    folders = [str(_ROOT), *filter(None, [inherited.get("PYTHONPATH")])]
    return inherited | {
        "PYTHONPATH": os.pathsep.join(folders),
        "STAGE_MODEL": location,
        "STAGE_MODEL_NAME": plan.name,
        "STAGE_BLOCKS": str(plan.stages[index].blocks),
        "STAGE_INDEX": str(index),
        "STAGE_COUNT": str(len(plan.stages)),
        "STAGE_PLAN": plan.digest,
        "STAGE_DTYPE": options.dtype,
        "STAGE_QUANTIZE": plan.quantize,
        "STAGE_DEVICE": options.device,
        "STAGE_THREADS": str(options.threads),
    }


def _device_text(device: str, threads: int) -> str:
    """For people: "cpu, 2 threads", or the name of the GPU where nvidia-smi tells it."""
    if not device.startswith("cuda"):
        return f"{device}, {threads} thread{'s' if threads != 1 else ''}" if threads else device
    number = int(device.partition(":")[2] or 0)
    names = _nvidia_smi("--query-gpu=name")
    return names[number] if number < len(names) else device


def _device_memory_bytes(pid: int) -> int:
    """What the process holds of its GPU's memory (torch keeps what it once had), 0 where nvidia-smi does not tell."""
    rows = [row.split(",") for row in _nvidia_smi("--query-compute-apps=pid,used_memory")]
    return sum(int(row[1]) << 20 for row in rows if row[0].strip() == str(pid) and row[1].strip().isdecimal())


def _nvidia_smi(query: str) -> list[str]:
    argv = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=_END_TIMEOUT_S, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def _rounded(duration_s: float) -> float:
    """Four digits: the rest is noise."""
    return float(f"{duration_s:.4g}")
