"""Fixtures of the stage's tests: its model in this process, steps for it, and stages as real processes."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from functions.contract import events
from functions.contract.checkpoint import Checkpoint, open_checkpoint
from functions.contract.frames import Frame
from functions.contract.messages import Opening, Samples, Slice, Step
from functions.contract.sampling import SamplingParams
from functions.contract.spans import BlockSpan
from functions.runner import Runner, load_runner
from functions.stage import Stage
from tests import warm
from tests.functions import processors

KV_BYTES_MAX = 1 << 20
PLAN = "0123456789abcdef"
BODY_BYTES_MAX = 64 << 10
WAIT_S = 240.0  # against hangs: on a busy machine a process may import torch for a minute

Chunk = tuple[int, int, Sequence[int]]  # sequence, start, tokens


@pytest.fixture(params=processors.KINDS)
def processor(request: pytest.FixtureRequest) -> Iterator[None]:
    """One test for each kind of processor that this machine can stand in for."""
    with processors.computed_as_on(request.param):
        yield


@pytest.fixture(scope="session")
def checkpoint(tiny_checkpoint: Path) -> Checkpoint:
    """The tiny Llama: 4 blocks, width 16, 256 positions."""
    return open_checkpoint(str(tiny_checkpoint))


@pytest.fixture(scope="session")
def runner_of(checkpoint: Checkpoint) -> Callable[[str], Runner]:
    """'0:2' -> the runner of these blocks, loaded once."""
    loaded: dict[str, Runner] = {}

    def get(span: str) -> Runner:
        if span not in loaded:
            loaded[span] = load_runner(checkpoint, BlockSpan.parse(span), torch.float32, torch.device("cpu"))
        return loaded[span]

    return get


@pytest.fixture
def stage_of(runner_of: Callable[[str], Runner]) -> Callable[..., Stage]:
    """('0:2', KV budget) -> a stage with nothing cached."""

    def make(span: str = "0:4", kv_bytes_max: int = KV_BYTES_MAX) -> Stage:
        return Stage(runner_of(span), kv_bytes_max)

    return make


def make_step(
    *chunks: Chunk, hidden: Frame | None = None, params: SamplingParams | None = None, sample: bool = True
) -> Step:
    """A step of (sequence, start, tokens) chunks; chunks that start at 0 are opened with `params`."""
    slices = tuple(Slice(sequence, start, len(tokens), sample) for sequence, start, tokens in chunks)
    opening = Opening(params or SamplingParams(), 1)
    openings = {s.sequence: opening for s in slices if s.start == 0}
    tokens = np.array([token for _, _, tokens in chunks for token in tokens], dtype=np.int32)
    return Step(slices, tokens, hidden, openings)


@pytest.fixture(scope="session")
def step_of() -> Callable[..., Step]:
    return make_step


@pytest.fixture(scope="session")
def reference(tiny_checkpoint: Path) -> Callable[[Sequence[int], int], list[int]]:
    """(prompt, n) -> the n tokens that Transformers generates greedily with the whole model."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32).eval()

    @torch.inference_mode()
    def greedy(prompt: Sequence[int], count: int) -> list[int]:
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        return tokens[len(prompt) :]

    return greedy


@dataclass
class StageProcess:
    """A stage's process, reached by HTTP."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path
    index: int
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=WAIT_S))

    def headers(self, kind: str, content_type: str = events.JSON, **changed: str | None) -> dict[str, str]:
        """Headers of a good event; `ce_x=None` leaves out ce-x, a text replaces it."""
        headers: dict[str, str | None] = {
            "ce-specversion": "1.0",
            "ce-type": kind,
            "ce-source": "/tests",
            "ce-id": "1",
            "ce-plan": PLAN,
            "ce-stage": str(self.index),
            "content-type": content_type,
        }
        headers |= {name.replace("_", "-"): value for name, value in changed.items()}
        return {name: value for name, value in headers.items() if value is not None}

    def post(self, headers: Mapping[str, str], content: Any = b"") -> httpx.Response:
        return self.client.post(self.url, headers=headers, content=content)

    def wake(self) -> dict[str, Any]:
        """Data of the answer, which comes once the stage is loaded."""
        response = self.post(self.headers(events.WAKE), b"{}")
        assert response.status_code == 200, response.text
        return dict(response.json())

    def step(self, body: bytes) -> bytes:
        response = self.post(self.headers(events.STEP, events.TENSORS), body)
        assert response.status_code == 200, response.text
        return response.content

    def release(self, *sequences: int) -> list[int]:
        response = self.post(self.headers(events.RELEASE), json.dumps({"sequences": sequences}).encode())
        return list(response.json()["released"])

    def get(self, path: str) -> httpx.Response:
        return self.client.get(self.url + path)

    def ended(self) -> tuple[int, str]:
        """Exit code and standard error, once the process has ended by itself."""
        return self.process.wait(WAIT_S), self.log.read_text()


class Chain:
    """Stage processes one after another, each given the body that the one before answered."""

    def __init__(self, *stages: StageProcess) -> None:
        self.stages = stages

    def step(self, step: Step) -> Samples:
        body = b"".join(step.to_body())
        for stage in self.stages:
            body = stage.step(body)
        return Samples.from_body(body)


@pytest.fixture(scope="session")
def chain_of() -> Callable[..., Chain]:
    return Chain


@pytest.fixture(scope="session")
def start_stage(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., StageProcess]]:
    """Starts stages that are stopped when the tests end; does not wait for them.

    start(settings, argv) takes settings without their STAGE_ and by default runs `python -m functions` with an
    inherited socket, in a fork that has imported torch, or with `cold` in a new interpreter; `by_port` passes HOST and
    PORT instead."""
    started: list[StageProcess] = []

    def start(
        settings: Mapping[str, object], argv: Sequence[str] = (), *, by_port: bool = False, cold: bool = False
    ) -> StageProcess:
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        env = {name: value for name, value in os.environ.items() if not name.startswith("STAGE_")}
        env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root), "HOST": "127.0.0.1", "PORT": str(port)}
        env |= {"STAGE_PLAN": PLAN} | {f"STAGE_{name.upper()}": str(value) for name, value in settings.items()}
        command = list(argv) or [sys.executable, "-m", "functions"]
        log = tmp_path_factory.mktemp("stage") / "stderr"
        fds: tuple[int, ...] = ()
        if by_port:
            listener.close()
        else:
            fds = (listener.fileno(),)
            command += ["--fd", str(listener.fileno())]
        with log.open("wb") as stderr, closing(listener):
            popen = subprocess.Popen if cold or argv else warm.Popen
            process = popen(command, stderr=stderr, stdout=stderr, cwd=root, env=env, pass_fds=fds)
        stage = StageProcess(process, f"http://127.0.0.1:{port}", log, int(str(settings.get("index", 0))))
        started.append(stage)
        return stage

    yield start
    for stage in started:
        stage.client.close()
        stage.process.terminate()  # a server with workers ends them too
    for stage in started:
        try:
            stage.process.wait(30)
        except subprocess.TimeoutExpired:
            stage.process.kill()
            stage.process.wait()


@pytest.fixture(scope="session")
def stages(start_stage: Callable[..., StageProcess], tiny_checkpoint: Path) -> list[StageProcess]:
    """The tiny model in two processes, which take events of up to BODY_BYTES_MAX."""
    common = {"model": tiny_checkpoint, "model_name": "tiny", "count": 2, "body_bytes_max": BODY_BYTES_MAX}
    started = [start_stage({**common, "blocks": span, "index": i}) for i, span in enumerate(("0:2", "2:4"))]
    for stage in started:
        stage.wake()
    return started
