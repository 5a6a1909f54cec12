"""What is asked over HTTP, each a process of its own: the real orchestrator, `transformers serve`, and a KServe model
server that takes one request at a time. Models speak the words of `checkpoints.spelling`.
"""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx

from benchmarks.bench import CORES, Bench, MeasureError
from benchmarks.http_load import Target, answers, streamed
from benchmarks.peers import Program, program
from benchmarks.prompts import read, spell
from benchmarks.stages import PLAN, StageProcess, cpu_s

HOST = "127.0.0.1"
NAME = "model"
LOOK_EVERY_S = 0.1
READY_TIMEOUT_S = 180.0
JSON = {"Content-Type": "application/json"}
SERVE_NEEDS = "accelerate"  # `transformers serve` gives every model a device map
# Of `transformers serve`: batches are built anew at every step. The sizes are for 64 sequences of up to 512 tokens; by
# itself it takes them from the memory of a GPU.
CONTINUOUS = (
    "--continuous-batching", "--cb-block-size", "128", "--cb-num-blocks", "256", "--cb-max-batch-tokens", "512",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Orchestrator:
    address: str
    pid: int

    async def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """All at once, each by a completion that is streamed."""
        body = {"model": NAME, "max_tokens": new_tokens, "temperature": 0, "stream": True}
        targets = [
            Target(self.address, "/openai/v1/completions", _json({**body, "prompt": list(prompt)}), JSON)
            for prompt in prompts
        ]
        return [_tokens_of_events(found) for found in await asyncio.gather(*map(streamed, targets))]

    def cpu_s(self) -> float:
        """CPU time so far, user and system."""
        return cpu_s(self.pid)


@dataclass(frozen=True, slots=True)
class TransformersServe:
    address: str
    model: str

    async def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """All at once, each by a completion that is answered whole: streams would cost it more."""
        body = {"model": self.model, "max_tokens": new_tokens, "temperature": 0}
        targets = [
            Target(self.address, "/v1/completions", _json({**body, "prompt": spell(prompt)}), JSON)
            for prompt in prompts
        ]
        found = await answers(targets, len(targets))
        return [read(json.loads(answer)["choices"][0]["text"]) for answer in found]


@dataclass(frozen=True, slots=True)
class OneAtATime:
    address: str

    async def ask(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """All at once; the server takes one after the other."""
        path = f"/v1/models/{NAME}:predict"
        targets = [
            Target(self.address, path, _json({"instances": [list(prompt)], "max_tokens": new_tokens}), JSON)
            for prompt in prompts
        ]
        found = await answers(targets, len(targets))
        return [json.loads(answer)["predictions"][0] for answer in found]


@asynccontextmanager
async def orchestrator(
    bench: Bench, model: Path, stages: Sequence[StageProcess], spread: int = 0
) -> AsyncIterator[Orchestrator]:
    """The product's own server before `stages`, as a pod runs it."""
    settings = {
        "MODEL": str(model),
        "MODEL_NAME": NAME,
        "STAGE_URLS": ",".join(stage.url for stage in stages),
        "PLAN": PLAN,
        "SPREAD": str(spread),
        "HOST": HOST,
        "GRPC_PORT": "0",
    }
    env = {f"ORCHESTRATOR_{name}": value for name, value in settings.items()}
    async with _server(bench, ["orchestrator.server"], 1, env, f"/v2/models/{NAME}/ready") as (address, pid):
        yield Orchestrator(address, pid)


@asynccontextmanager
async def transformers_serve(bench: Bench, model: Path) -> AsyncIterator[TransformersServe]:
    """Raises MeasureError where a package that it needs is not installed."""
    if find_spec(SERVE_NEEDS) is None:
        raise MeasureError(f"`transformers serve` needs the package {SERVE_NEEDS}; install the extra dev")
    port = free_port()
    arguments = ["transformers.cli.transformers", "serve", str(model), "--device", "cpu", "--dtype", "float32"]
    arguments += ["--host", HOST, "--port", str(port), "--log-level", "error", *CONTINUOUS]
    async with _server(bench, arguments, CORES, {}, "/health", port) as (address, _):
        yield TransformersServe(address, str(model))


@asynccontextmanager
async def one_at_a_time(bench: Bench, model: Path) -> AsyncIterator[OneAtATime]:
    async with _server(bench, ["benchmarks.peer_kserve"], CORES, {"MODEL": str(model)}, f"/v2/models/{NAME}/ready") as (
        address,
        _,
    ):
        yield OneAtATime(address)


@asynccontextmanager
async def _server(
    bench: Bench, arguments: Sequence[str], threads: int, env: Mapping[str, str], ready: str, port: int | None = None
) -> AsyncIterator[tuple[str, int]]:
    """HOST:PORT and process id, once GET `ready` is answered by 200."""
    port = port or free_port()
    ports = {"PORT": str(port)}
    log = bench.log_dir / f"{arguments[0]}-{port}.log"
    async with program(arguments, threads, {**env, **ports}, log) as running:
        await _until_ready(running, f"http://{HOST}:{port}{ready}")
        yield f"{HOST}:{port}", running.pid


async def _until_ready(running: Program, url: str) -> None:
    gives_up_s = time.monotonic() + READY_TIMEOUT_S
    async with httpx.AsyncClient(trust_env=False, timeout=READY_TIMEOUT_S) as client:
        while time.monotonic() < gives_up_s:
            await running.check()
            try:
                if (await client.get(url)).status_code == 200:
                    return
            except httpx.HTTPError:
                pass  # its port is not open yet
            await asyncio.sleep(LOOK_EVERY_S)
    raise MeasureError(f"{url} did not answer 200 in {READY_TIMEOUT_S:.0f} s")


def free_port() -> int:
    """One that was free a moment ago: these programs take no socket that is open already."""
    with socket.create_server((HOST, 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


def _json(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body).encode()


def _tokens_of_events(body: bytes) -> list[int]:
    """The tokens of a streamed completion. Raises MeasureError."""
    texts = []
    for line in body.splitlines():
        if line.startswith(b"data: {"):
            event = json.loads(line.removeprefix(b"data: "))
            if "error" in event:
                raise MeasureError(f"a stream ended with an error: {event['error']}")
            texts += [choice["text"] for choice in event["choices"]]
    return read("".join(texts))
