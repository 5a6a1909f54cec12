"""Real stage processes for the tests that compare with Transformers."""

from __future__ import annotations

import asyncio
import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
import torch
import yaml
from aiohttp import web

from functions.contract import events
from functions.contract.sampling import SamplingParams
from orchestrator.chain import Chain, ChainSettings
from orchestrator.generation import GenerationRequest
from tests import warm
from tests.exactness.fleet import Fleet

VOCABULARY = 211
PLAN = "test-plan"
ARCHITECTURES: dict[str, dict[str, Any]] = yaml.safe_load(
    (Path(__file__).parents[1] / "architectures.yaml").read_text()
)


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A small random checkpoint of an architecture, made once. Weights are large enough that texts differ."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            # without end and padding tokens every generation runs to its full length
            config = CONFIG_MAPPING[name](**{**ARCHITECTURES[name], "eos_token_id": None, "pad_token_id": None})
            model = AutoModelForCausalLM.from_config(config)
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    torch.nn.init.normal_(parameter, std=0.3)
                else:
                    parameter.data += 0.1 * torch.randn_like(parameter)
            for path, buffer in model.named_buffers():
                if path.endswith("correction_bias"):  # deepseek leaves it unset
                    buffer.zero_()
            made[name] = tmp_path_factory.mktemp(name)
            with contextlib.redirect_stderr(io.StringIO()):
                model.save_pretrained(made[name])
        return made[name]

    return make


@pytest.fixture(scope="session")
def talkative(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny Llama with its tokenizer, but a context of 4096 and weights so large that every token matters."""
    from transformers import LlamaForCausalLM

    folder = Path(shutil.copytree(tiny_checkpoint, tmp_path_factory.mktemp("talkative") / "tiny"))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(2)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.3)
    model.config.max_position_embeddings = 4096
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def until_empty() -> Callable[[str], Awaitable[None]]:
    """Waits until the stage at a URL says in its metrics that it holds no sequence."""

    async def wait(url: str) -> None:
        async with httpx.AsyncClient() as client:
            for _ in range(400):
                if "stagecraft_stage_sequences 0.0" in (await client.get(f"{url}/metrics")).text:
                    return
                await asyncio.sleep(0.05)
        pytest.fail(f"the stage at {url} still holds sequences")

    return wait


@pytest.fixture(scope="session")
def whole_model(checkpoint_of: Callable[[str], Path]) -> Callable[[str, Sequence[int], int], list[int]]:
    """What Transformers' own generate answers: (architecture, prompt, new tokens) -> token ids, greedy, fp32."""
    from transformers import AutoModelForCausalLM

    loaded: dict[str, Any] = {}

    def generate(name: str, prompt: Sequence[int], count: int) -> list[int]:
        if name not in loaded:
            loaded.clear()
            model = AutoModelForCausalLM.from_pretrained(
                checkpoint_of(name), attn_implementation="eager", dtype=torch.float32
            )
            loaded[name] = model.eval()
        ids = torch.tensor([list(prompt)])
        out = loaded[name].generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
        )
        return out[0, len(prompt) :].tolist()  # type: ignore[no-any-return]

    return generate


class Stages:
    """The processes of one chain. `urls` in order; `kill` and `start` end and replace one at its old port, which stays
    open meanwhile; after `lose` nothing listens there any more."""

    def __init__(self, model: Path, spans: Sequence[str], environment: dict[str, str]) -> None:
        self._listeners = [socket.create_server(("127.0.0.1", 0)) for _ in spans]
        self.urls = [f"http://127.0.0.1:{listener.getsockname()[1]}" for listener in self._listeners]
        self._environments = [
            {
                "STAGE_MODEL": str(model),
                "STAGE_BLOCKS": span,
                "STAGE_INDEX": str(index),
                "STAGE_COUNT": str(len(spans)),
                "STAGE_PLAN": PLAN,
                "STAGE_THREADS": "1",
                **environment,
            }
            for index, span in enumerate(spans)
        ]
        self.processes = [self._process(index) for index in range(len(spans))]

    def start(self, index: int) -> None:
        self.processes[index] = self._process(index)

    def _process(self, index: int) -> warm.Popen:
        fd = self._listeners[index].fileno()
        env = {**os.environ, **self._environments[index]}
        return warm.Popen([sys.executable, "-m", "functions", "--fd", str(fd)], env=env, pass_fds=[fd])

    def kill(self, index: int) -> None:
        self.processes[index].kill()
        self.processes[index].wait()

    def lose(self, index: int) -> None:
        self._listeners[index].close()
        self.kill(index)

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            process.wait()
        for listener in self._listeners:
            listener.close()


@pytest.fixture(scope="session")
def running_stages() -> Callable[..., AbstractContextManager[Stages]]:
    """(folder, ["0:2", "2:4"], NAME=value...) -> a context with running stage processes, for longer than a test."""

    @contextlib.contextmanager
    def run(model: Path, spans: Sequence[str], **environment: str) -> Iterator[Stages]:
        stages = Stages(model, spans, environment)
        try:
            yield stages
        finally:
            stages.close()

    return run


@pytest.fixture
def start_stages(checkpoint_of: Callable[[str], Path]) -> Iterator[Callable[..., Stages]]:
    """(architecture or folder, ["0:2", "2:4"], NAME=value...) -> running stage processes, ended with the test."""
    started: list[Stages] = []

    def start(model: str | Path, spans: Sequence[str], **environment: str) -> Stages:
        folder = model if isinstance(model, Path) else checkpoint_of(model)
        started.append(Stages(folder, spans, environment))
        return started[-1]

    yield start
    for stages in started:
        stages.close()


class Service:
    """Passes events on to the first replica that is not `down`, or to all those in turn. `answered` is called with how
    many steps it has passed on, after each."""

    def __init__(self, session: aiohttp.ClientSession, replicas: Sequence[str]) -> None:
        self.replicas = list(replicas)
        self.down: set[str] = set()
        self.in_turn = False
        self.asked: Counter[str] = Counter()  # replicas, events that were passed on
        self.steps = 0
        self.answered: Callable[[int], None] = lambda steps: None
        self.url = ""
        self._session = session
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/", self._pass_on)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=0)

    async def open(self) -> None:
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0).start()
        host, port = self._runner.addresses[0][:2]
        self.url = f"http://{host}:{port}"

    async def close(self) -> None:
        await self._runner.cleanup()

    async def _pass_on(self, request: web.Request) -> web.Response:
        able = [url for url in self.replicas if url not in self.down]
        if not able:
            return web.Response(text="no replica\n", status=503)
        url = able[self.asked.total() % len(able) if self.in_turn else 0]
        self.asked[url] += 1
        async with self._session.post(url, data=await request.read(), headers=_ours(request.headers)) as reply:
            answer = web.Response(body=await reply.read(), status=reply.status, headers=_ours(reply.headers))
        if request.headers["ce-type"] == events.STEP:
            self.steps += 1
            self.answered(self.steps)
        return answer


def _ours(headers: Any) -> dict[str, str]:
    return {name: value for name, value in headers.items() if name.lower().startswith(("ce-", "content-type"))}


class Replicas:
    """Several of each stage; lanes are given the first of those that live."""

    def __init__(self, session: aiohttp.ClientSession, sets: Sequence[Any]) -> None:
        self.sets = sets
        self.services = [Service(session, replicas) for replicas in zip(*(each.urls for each in sets), strict=True)]

    @property
    def urls(self) -> list[str]:
        return [service.url for service in self.services]

    def lose(self, stage: int, which: int = 0) -> None:
        """SIGKILL, of which the service knows at once."""
        self.services[stage].down.add(self.sets[which].urls[stage])
        self.sets[which].lose(stage)

    def stop(self, stage: int, which: int = 0) -> None:
        """SIGSTOP, of which the service knows nothing."""
        os.kill(self.sets[which].processes[stage].pid, signal.SIGSTOP)

    def go_on(self, stage: int, which: int = 0) -> None:
        os.kill(self.sets[which].processes[stage].pid, signal.SIGCONT)

    async def tokens(self, stages: Sequence[int], which: int = 0) -> list[float]:
        """Computed so far by replicas of these stages, as they say themselves."""
        async with httpx.AsyncClient() as client:
            pages = [(await client.get(f"{self.sets[which].urls[stage]}/metrics")).text for stage in stages]
        return [_sum(page, "stagecraft_stage_tokens_total") for page in pages]


def _sum(text: str, name: str) -> float:
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((f"{name} ", f"{name}{{")))


@pytest.fixture
async def start_replicas(start_stages: Callable[..., Stages]) -> AsyncIterator[Callable[..., Awaitable[Replicas]]]:
    """(architecture or folder, ["0:2", "2:4"], how many of each stage) -> `Replicas`."""
    started: list[Replicas] = []
    async with aiohttp.ClientSession() as session:

        async def start(model: str | Path, spans: Sequence[str], count: int = 2) -> Replicas:
            started.append(Replicas(session, [start_stages(model, spans) for _ in range(count)]))
            for service in started[-1].services:
                await service.open()
            return started[-1]

        yield start
        for replicas in started:
            for service in replicas.services:
                await service.close()


@pytest.fixture
async def fleet(start_stages: Any) -> AsyncIterator[Fleet]:
    async with aiohttp.ClientSession() as session:
        fleet = Fleet(session, start_stages)
        await fleet.start()
        yield fleet
        for door in fleet.doors:
            await door.close()


@pytest.fixture
async def open_chain() -> AsyncIterator[Callable[..., Any]]:
    """(stages, settings) -> a chain over them that has woken every stage."""
    opened: list[Chain] = []

    async def start(stages: Stages, settings: ChainSettings | None = None) -> Chain:
        chain = Chain(PLAN, stages.urls, settings)
        opened.append(chain)
        await chain.start()
        return chain

    yield start
    for chain in opened:
        await chain.close()


@pytest.fixture(scope="session")
def answer() -> Callable[..., Any]:
    """(chain, prompt, new tokens, params) -> the token ids that the chain answers."""

    async def collect(
        chain: Chain, prompt: Sequence[int], count: int, params: SamplingParams | None = None
    ) -> list[int]:
        request = GenerationRequest(tuple(prompt), count, params or SamplingParams())
        return [token.id async for token in chain.generate(request)]

    return collect


@pytest.fixture(scope="session")
def steps_taken() -> Callable[[str], int]:
    """A stage's URL -> the step events that it has answered, by its own count."""

    def count(url: str) -> int:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        counts = [line for line in lines if line.startswith("stagecraft_stage_events_total{")]
        return int(sum(float(line.split()[-1]) for line in counts if f'type="{events.STEP}"' in line))

    return count


@pytest.fixture(scope="session")
def tokens_computed() -> Callable[[str], int]:
    """A stage's URL -> the tokens that it has computed, by its own count."""

    def count(url: str) -> int:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        return int(next(float(line.split()[-1]) for line in lines if line.startswith("stagecraft_stage_tokens_total ")))

    return count


@pytest.fixture(scope="session")
def prompts() -> list[list[int]]:
    """Eight prompts of different lengths, some past the sliding windows of the small models."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCABULARY, (n,), generator=generator).tolist() for n in (5, 13, 40, 1, 7, 22, 3, 60)]
