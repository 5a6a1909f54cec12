"""A broker of our own that answers as it is told, a results service as a process, and commands against both."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import httpx
import pytest
from aiohttp import web
from typer.testing import CliRunner

from knative import registry
from knative.client import Client
from tests import warm

ROOT = Path(__file__).resolve().parents[3]
BATCH_REQUEST = "dev.stagecraft.batch.request.v1"
BATCH_CANCEL = "dev.stagecraft.batch.cancel.v1"


@dataclass
class Answer:
    """What the broker says instead of taking events; status 0 breaks the connection."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    text: str = ""
    accepts: bool = False  # takes them all the same, so that the client sends what is there already


@dataclass
class Broker:
    """A broker with the model and the results service behind it: each request event becomes a result event.

    `posts` are the bodies' modes and numbers of events; `script` is used up first; `copies` of each result are sent."""

    url: str = ""
    results: str = ""  # where results are posted; "" for nowhere
    takes_batches: bool = True
    room: int | None = None  # posts that are still taken, before it is overloaded
    copies: int = 1
    batch_refused: str = ""  # a custom_id for which there is no room in any event
    script: deque[Answer] = field(default_factory=deque)
    posts: list[tuple[str, int]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    outcome: Callable[[dict[str, Any]], dict[str, Any]] = lambda line: {
        "response": {"status_code": 200, "request_id": "r", "body": {"text": line["body"].get("prompt")}},
        "error": None,
    }
    answers: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] = lambda events: events  # which get results
    answering: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self) -> web.AppRunner:
        self.http = aiohttp.ClientSession()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_post("/default/default", self.take)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}/default/default"
        return runner

    async def stop(self, runner: web.AppRunner) -> None:
        for task in self.answering:
            task.cancel()
        await asyncio.gather(*self.answering, return_exceptions=True)
        await self.http.close()
        await runner.cleanup()

    def requests(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event["type"] == BATCH_REQUEST]

    async def take(self, request: web.Request) -> web.Response:
        events, mode = await _events(request)
        self.posts.append((mode, len(events)))
        answer = self.script.popleft() if self.script else None
        if answer is not None and not answer.accepts:
            return self._refuse(request, answer)
        if mode == "batched" and not self.takes_batches:
            return web.Response(status=415, text="no batches here")
        if self.room is not None:
            if not self.room:
                return web.Response(status=503, headers={"retry-after": "1"})
            self.room -= 1
        if self.batch_refused and any(event.get("customid") == self.batch_refused for event in events):
            return web.Response(status=400, text="that one is wrong")
        self.events += events
        if self.results:
            self.answering.append(asyncio.create_task(self._answer(self.answers(events))))
        return self._refuse(request, answer) if answer else web.Response(status=202)

    def _refuse(self, request: web.Request, answer: Answer) -> web.Response:
        if answer.status == 0:
            assert request.transport is not None
            request.transport.abort()
        return web.Response(status=answer.status or 500, headers=answer.headers, text=answer.text)

    async def _answer(self, events: list[dict[str, Any]]) -> None:
        results = [self._result(event) for event in events if event["type"] == BATCH_REQUEST]
        results += [event for event in events if event["type"] == BATCH_CANCEL]
        body = json.dumps(results * self.copies).encode()
        while True:
            try:
                headers = {"content-type": "application/cloudevents-batch+json"}
                async with self.http.post(self.results, data=body, headers=headers) as answer:
                    if answer.status == 202:
                        return
            except aiohttp.ClientError:
                pass
            await asyncio.sleep(0.05)

    def _result(self, event: dict[str, Any]) -> dict[str, Any]:
        line = event["data"]
        data = {"id": event["id"], "custom_id": line["custom_id"], **self.outcome(line)}
        names = {name: event[name] for name in ("specversion", "batch", "customid", "datacontenttype")}
        kind = "dev.stagecraft.batch.result.v1"
        return {**names, "type": kind, "source": "/stagecraft/m", "id": f"{event['id']}.result", "data": data}


async def _events(request: web.Request) -> tuple[list[dict[str, Any]], str]:
    """As JSON events, whatever the mode."""
    body = await request.read()
    if request.content_type == "application/cloudevents-batch+json":
        return json.loads(body), "batched"
    from urllib.parse import unquote

    event: dict[str, Any] = {
        name[3:].lower(): unquote(value) for name, value in request.headers.items() if name.lower().startswith("ce-")
    }
    event["datacontenttype"] = request.content_type
    return [{**event, "data": json.loads(body)}], "single"


@pytest.fixture
def broker() -> Iterator[Broker]:
    """In a thread with an event loop of its own."""
    made = Broker()
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        runner = asyncio.run_coroutine_threadsafe(made.start(), loop).result(30)
        yield made
        asyncio.run_coroutine_threadsafe(made.stop(runner), loop).result(30)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


@dataclass
class ResultsService:
    """`python -m orchestrator.batches.server` over one file; can be killed and started again at the same address."""

    file: Path
    port: int
    log: Path
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        env = {**os.environ, "PORT": str(self.port), "HOST": "127.0.0.1", "RESULTS_FILE": str(self.file)}
        argv = [sys.executable, "-m", "orchestrator.batches.server"]
        with self.log.open("ab") as log:
            self.process = warm.Popen(argv, cwd=ROOT, env=env, stderr=log, stdout=log)
        while True:
            assert self.process.poll() is None, self.log.read_text()
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port)):
                return
            time.sleep(0.02)

    def end(self, number: int = signal.SIGTERM) -> int:
        """The exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(30)

    def counts(self, batch: str) -> dict[str, Any]:
        return httpx.get(f"{self.url}/batches/{batch}").json()

    def lines(self, batch: str) -> list[dict[str, Any]]:
        body = httpx.get(f"{self.url}/batches/{batch}/results?limit=10000").content
        return [json.loads(line) for line in body.splitlines()]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def make_service(folder: Path) -> ResultsService:
    service = ResultsService(folder / "results.sqlite", free_port(), folder / "results.log")
    service.start()
    return service


@pytest.fixture(scope="session")
def results_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ResultsService]:
    """For tests that leave it as it is; batches have different names."""
    service = make_service(tmp_path_factory.mktemp("results"))
    yield service
    assert service.end() == 0, service.log.read_text()
    assert "Traceback" not in service.log.read_text()


@pytest.fixture
def own_results_service(tmp_path: Path) -> Iterator[ResultsService]:
    """For tests that kill it."""
    service = make_service(tmp_path)
    yield service
    if service.process is not None and service.process.poll() is None:
        service.end(signal.SIGKILL)


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)


@pytest.fixture
def state_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where journals are remembered in this test; no platform is found."""
    home = tmp_path / "state"
    monkeypatch.setenv("XDG_STATE_HOME", str(home))
    runtime = tmp_path / "run"
    runtime.mkdir(mode=0o700)
    monkeypatch.setenv("STAGECRAFT_RUNTIME_DIR", str(runtime))
    return home


@pytest.fixture
def batch(state_home: Path) -> Callable[..., Outcome]:
    """batch("submit", file, ...) -> its outcome, run in this process."""
    from orchestrator.cli import app

    def run(*arguments: object, input: str | bytes | None = None) -> Outcome:
        done = CliRunner().invoke(app, ["batch", *map(str, arguments)], input=input)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return Outcome(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture
def start_batch(state_home: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """start_batch("submit", file, ...) -> the running command, as a process of its own; killed at the end."""
    started: list[subprocess.Popen[str]] = []

    def run(*arguments: object, stdin: Any = subprocess.DEVNULL) -> subprocess.Popen[str]:
        argv = [sys.executable, "-P", "-m", "orchestrator.cli", "batch", *map(str, arguments)]
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        pipe = subprocess.PIPE
        started.append(warm.Popen(argv, stdin=stdin, stdout=pipe, stderr=pipe, text=True, env=env))
        return started[-1]

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[[int], Path]:
    """prompts(100) -> a file of so many plain lines."""

    def write(count: int) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_text("".join(json.dumps({"prompt": f"p{number}", "model": "m"}) + "\n" for number in range(count)))
        return path

    return write


@dataclass
class BatchPlatform:
    """A command that runs a platform; can be killed and started again at the same address and folder.

    `inside` is a command that runs the command behind it."""

    command: tuple[object, ...]
    folder: Path
    runtime: Path
    inside: tuple[object, ...] = ()
    port: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return str(self.facts["url"])

    @property
    def log(self) -> Path:
        return self.folder / "stderr"

    def start(self) -> None:
        """Returns when it listens; everything is at zero then."""
        argv = [*self.inside, sys.executable, "-P", "-m", "orchestrator.cli", *self.command, "--json"]
        argv += ["--port", self.port, "--data-dir", self.folder / "data", "--log-dir", self.folder / "logs"]
        env = {**os.environ, "STAGECRAFT_RUNTIME_DIR": str(self.runtime), "OMP_NUM_THREADS": "1"}
        with self.log.open("a") as log:
            popen = subprocess.Popen if self.inside else warm.Popen
            self.process = popen(
                [str(one) for one in argv], stdout=subprocess.PIPE, stderr=log, text=True, cwd=ROOT, env=env
            )
        assert self.process.stdout is not None
        with self.process.stdout as stdout:
            line = stdout.readline()
        assert line, self.log.read_text()
        self.facts = json.loads(line)
        self.port = int(self.url.rpartition(":")[2])

    def end(self, number: int = signal.SIGINT) -> int:
        """The exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(60)

    def status(self) -> dict[str, Any]:
        with Client(registry.find(self.facts.get("platform") or self.facts["name"]).socket) as client:
            return client.status()

    def pids(self, service: str) -> list[int]:
        """Of the replicas that run or start."""
        pods = [pod for one in self.status()["revisions"] if one["service"] == service for pod in one["pods"]]
        return [pod["pid"] for pod in pods if pod["pid"]]


@pytest.fixture
def start_platform(
    tmp_path: Path, state_home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., BatchPlatform]]:
    """start_platform("a", "local", "start", inside=lambda folder: ...) -> one in a folder called so; killed at the end
    if it still runs. It, and no other one, is what commands of this test find."""
    made: list[BatchPlatform] = []
    with tempfile.TemporaryDirectory(prefix="sc-") as runtime:  # short enough for sockets
        monkeypatch.setenv("STAGECRAFT_RUNTIME_DIR", runtime)

        def start(
            name: str, *command: object, inside: Callable[[Path], tuple[object, ...]] = lambda folder: ()
        ) -> BatchPlatform:
            folder = tmp_path / name
            folder.mkdir()
            made.append(BatchPlatform(command, folder, Path(runtime), inside(folder)))
            made[-1].start()
            return made[-1]

        yield start
        for one in made:
            if one.process is not None and one.process.poll() is None:
                one.end(signal.SIGKILL)


@pytest.fixture
def batch_platform(tiny_checkpoint: Path, start_platform: Callable[..., BatchPlatform]) -> Callable[..., BatchPlatform]:
    """batch_platform("a", "--window", "6s") -> `stagecraft up --batch` of model "tiny" in 2 stages."""
    up = ("up", tiny_checkpoint, "--name", "tiny", "--stages", 2, "--threads", 1, "--batch", "--grpc-port", 0)
    return lambda name, *options, **how: start_platform(name, *up, *options, **how)
