"""Runs a plan on this machine: one process for each stage and one for the orchestrator, all started at once.

    up ──┬── python -m functions --fd N   (stage 0)   the listening sockets are bound here and handed down,
         ├── python -m functions --fd N   (stage 1)   so stage ports cannot collide and addresses are known
         └── python -m orchestrator.server            before a stage has started

The set of processes is fixed: when one ends, the whole deployment has failed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar
from urllib.parse import quote

import httpx

from orchestrator import processes
from orchestrator.processes import Child

if TYPE_CHECKING:
    from orchestrator.plan import Plan

ROOT = str(Path(__file__).resolve().parents[1])  # where our packages are imported from
STAGE_HOST = "127.0.0.1"
BACKLOG = 1024
POLL_S = 0.05
PROBE_TIMEOUT_S = 2.0
ORCHESTRATOR_GRACE_S = 5.0  # running answers may end
STAGE_GRACE_S = 3.0
CULPRIT_WAIT_S = 1.0

State = Literal["starting", "loading", "ready"]
Observe = Callable[[str, State], None]
T = TypeVar("T")


class LaunchError(Exception):
    """The deployment cannot start or go on; the text is for people. `exit_code` is what `up` ends with."""

    exit_code = 1


class AddressError(LaunchError):
    """A port or host cannot be had: another value of the option heals it."""

    exit_code = 2


@dataclass(frozen=True, slots=True)
class LaunchSettings:
    """Where the orchestrator listens and what each stage gets. Ports: 0 takes any free one."""

    log_dir: Path
    host: str = "127.0.0.1"
    http_port: int = 8080
    grpc_port: int = 8081
    device: str = "auto"
    threads_per_stage: int = 1
    kv_bytes_max: int | None = None  # each stage decides by the memory that is free


@dataclass(frozen=True, slots=True)
class Urls:
    """The ways in, as a client on this machine writes them."""

    base: str  # http://HOST:PORT
    grpc: str  # HOST:PORT
    name: str  # of the model

    @property
    def openai(self) -> str:
        return f"{self.base}/openai/v1"

    @property
    def v1(self) -> str:
        return f"{self.base}/v1/models/{quote(self.name, safe='')}:predict"

    @property
    def v2(self) -> str:
        return f"{self.base}/v2/models/{quote(self.name, safe='')}/infer"

    @property
    def metrics(self) -> str:
        return f"{self.base}/metrics"

    @property
    def ready(self) -> str:
        return f"{self.base}/v2/models/{quote(self.name, safe='')}/ready"


def default_threads(stages: int) -> int:
    """Torch threads for each of `stages` stages: an equal share of the cores this process may use, at least 1."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    return max(1, cores // stages)


def stage_name(index: int) -> str:
    return f"stage {index}"


def stage_environment(plan: Plan, index: int, settings: LaunchSettings) -> dict[str, str]:
    """The variables that tell `python -m functions` which stage it is."""
    # all stages run on one machine and, unless told otherwise, on one device
    budget = {"STAGE_KV_SHARE": str(1 / len(plan.stages))}
    if settings.kv_bytes_max is not None:
        budget = {"STAGE_KV_BYTES_MAX": str(settings.kv_bytes_max)}
    return {
        **budget,
        "STAGE_MODEL": plan.model,
        "STAGE_MODEL_NAME": plan.name,
        "STAGE_BLOCKS": str(plan.stages[index].blocks),
        "STAGE_INDEX": str(index),
        "STAGE_COUNT": str(len(plan.stages)),
        "STAGE_PLAN": plan.digest,
        "STAGE_DTYPE": plan.dtype,
        "STAGE_DEVICE": settings.device,
        "STAGE_THREADS": str(settings.threads_per_stage),
    }


def orchestrator_environment(plan: Plan, stage_urls: list[str], settings: LaunchSettings) -> dict[str, str]:
    """The variables that tell `python -m orchestrator.server` what it chains and where it listens."""
    return {
        "ORCHESTRATOR_MODEL": plan.model,
        "ORCHESTRATOR_MODEL_NAME": plan.name,
        "ORCHESTRATOR_STAGE_URLS": ",".join(stage_urls),
        "ORCHESTRATOR_PLAN": plan.digest,
        "ORCHESTRATOR_HOST": settings.host,
        "ORCHESTRATOR_HTTP_PORT": str(settings.http_port),
        "ORCHESTRATOR_GRPC_PORT": str(settings.grpc_port),
        # it has to end by itself before `Deployment.stop` loses patience
        "ORCHESTRATOR_GRACE_S": str(max(0, int(ORCHESTRATOR_GRACE_S) - 1)),
    }


def listen(host: str, port: int, option: str) -> socket.socket:
    """A listening socket; port 0 takes any free one. Raises AddressError, which names `option`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))
        sock.listen(BACKLOG)
    except (OSError, OverflowError) as error:
        sock.close()
        raise AddressError(_why_not(host, port, option, error)) from None
    return sock


def choose_ports(host: str, http_port: int, grpc_port: int) -> tuple[int, int]:
    """The two ports, any free ones for 0. Raises AddressError when one is taken.

    They are free now; the server binds them itself a moment later."""
    with listen(host, http_port, "--port") as http, listen(host, grpc_port, "--grpc-port") as grpc:
        return http.getsockname()[1], grpc.getsockname()[1]


class Deployment:
    """The processes of one plan, from their start on. Make it with `launch`."""

    def __init__(self, stages: list[Child], stage_urls: list[str], orchestrator: Child, urls: Urls) -> None:
        self.stages = stages
        self.stage_urls = stage_urls
        self.orchestrator = orchestrator
        self.urls = urls
        self._exits = {asyncio.ensure_future(child.wait()): child for child in (*stages, orchestrator)}

    async def wait_ready(self, observe: Observe) -> None:
        """Until all stages and the orchestrator can serve. Raises LaunchError when a process ends before that."""
        async with httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False) as client:
            pairs = zip(self.stages, self.stage_urls, strict=True)
            questions = [(child, f"{url}/readyz") for child, url in pairs]
            questions.append((self.orchestrator, self.urls.ready))
            await self.unless_one_ends(_all_ready(client, questions, observe))

    async def wait_end(self) -> None:
        """Until a process ends by itself, which raises LaunchError: nothing is restarted."""
        await self.unless_one_ends(asyncio.Event().wait())

    async def unless_one_ends(self, work: Awaitable[T]) -> T:
        """The result of `work`; raises LaunchError when a process ends first."""
        task = asyncio.ensure_future(work)
        try:
            await asyncio.wait({task, *self._exits}, return_when=asyncio.FIRST_COMPLETED)
            if any(ended.done() for ended in self._exits):
                culprit = await self._culprit()
                raise LaunchError(_obituary(culprit, culprit.how_it_ended()))
            return await task
        finally:
            task.cancel()
            await asyncio.wait({task})
            if not task.cancelled():
                task.exception()  # has been seen: it came together with the end of a process, which says more

    async def _culprit(self) -> Child:
        """Of the processes that have ended, the one to blame: the orchestrator ends when a stage has failed, and may
        be faster in that."""
        stage_exits = [ended for ended, child in self._exits.items() if child is not self.orchestrator]
        await asyncio.wait(stage_exits, timeout=CULPRIT_WAIT_S, return_when=asyncio.FIRST_COMPLETED)
        # stages come first
        return next(child for ended, child in self._exits.items() if ended.done())

    async def stop(self) -> None:
        """Ends all processes, the orchestrator first; after a while, or when cancelled, with SIGKILL."""
        grace_s = STAGE_GRACE_S
        try:
            await processes.stop([self.orchestrator], ORCHESTRATOR_GRACE_S)
        except asyncio.CancelledError:
            grace_s = 0
            raise
        finally:
            await processes.stop(self.stages, grace_s)
            await asyncio.gather(*self._exits)


@asynccontextmanager
async def launch(plan: Plan, settings: LaunchSettings) -> AsyncIterator[Deployment]:
    """Starts all processes and stops them on the way out. Raises LaunchError; then nothing is left running."""
    http_port, grpc_port = choose_ports(settings.host, settings.http_port, settings.grpc_port)
    urls = _urls(settings.host, http_port, grpc_port, plan.name)
    started: list[Child] = []
    with ExitStack() as sockets:
        try:
            stage_urls = []
            for index in range(len(plan.stages)):
                sock = sockets.enter_context(listen(STAGE_HOST, 0, "--stages"))
                stage_urls.append(f"http://{STAGE_HOST}:{sock.getsockname()[1]}")
                started.append(await _start_stage(plan, index, sock, settings))
            ports = {"ORCHESTRATOR_HTTP_PORT": str(http_port), "ORCHESTRATOR_GRPC_PORT": str(grpc_port)}
            env = orchestrator_environment(plan, stage_urls, settings) | ports
            started.append(await _start("orchestrator", ["orchestrator.server"], env, settings))
        except BaseException as error:
            await processes.stop(started, 0)
            if isinstance(error, OSError):
                raise LaunchError(f"cannot start the processes: {error}; their logs go to {settings.log_dir}") from None
            raise
    # our copies of the sockets are closed by now: a stage that dies refuses connections at once
    deployment = Deployment(started[:-1], stage_urls, started[-1], urls)
    try:
        yield deployment
    finally:
        await deployment.stop()


async def _start_stage(plan: Plan, index: int, sock: socket.socket, settings: LaunchSettings) -> Child:
    arguments = ["functions", "--fd", str(sock.fileno())]
    env = stage_environment(plan, index, settings)
    return await _start(stage_name(index), arguments, env, settings, (sock.fileno(),))


async def _start(
    name: str, module: list[str], env: Mapping[str, str], settings: LaunchSettings, pass_fds: tuple[int, ...] = ()
) -> Child:
    # -P: files in the user's current folder must not stand in for packages; our own may not be installed
    argv = [sys.executable, "-P", "-m", *module]
    paths = os.pathsep.join(filter(None, [ROOT, os.environ.get("PYTHONPATH")]))
    log = settings.log_dir / f"{name.replace(' ', '-')}.log"
    full = {**os.environ, **env, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    return await Child.start(name, argv, env=full, log=log, pass_fds=pass_fds)


async def _all_ready(client: httpx.AsyncClient, questions: list[tuple[Child, str]], observe: Observe) -> None:
    try:
        async with asyncio.TaskGroup() as group:
            for child, url in questions:
                group.create_task(_probe(client, child, url, observe))
    except BaseExceptionGroup as several:
        raise several.exceptions[0] from None


async def _probe(client: httpx.AsyncClient, child: Child, url: str, observe: Observe) -> None:
    """Until `url` answers 200. A stage answers 500 with the reason when loading has failed."""
    seen: State = "starting"
    observe(child.name, seen)
    while seen != "ready":
        state = await _ask(client, child, url)
        if state != seen and state != "starting":  # what loads does not start again
            observe(child.name, state)
            seen = state
        if state != "ready":
            await asyncio.sleep(POLL_S)


async def _ask(client: httpx.AsyncClient, child: Child, url: str) -> State:
    try:
        answer = await client.get(url)
    except httpx.TransportError:
        return "starting"
    if answer.status_code == 500:
        raise LaunchError(_obituary(child, f"could not start: {_error_text(answer)}"))
    return "ready" if answer.status_code == 200 else "loading"


def _error_text(answer: httpx.Response) -> str:
    try:
        return str(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200]


def _obituary(child: Child, how: str) -> str:
    lines = "".join(f"\n  | {line}" for line in child.last_lines())
    said = f"; the end of what it printed ({child.log}):{lines}" if lines else " and printed nothing"
    return f"{child.name} {how}{said}"


def _urls(host: str, http_port: int, grpc_port: int, name: str) -> Urls:
    """A wildcard address is for servers; a client on this machine uses loopback."""
    reachable = {"0.0.0.0": "127.0.0.1", "::": "[::1]", "": "127.0.0.1"}.get(host)
    reachable = reachable or (f"[{host}]" if ":" in host else host)
    return Urls(f"http://{reachable}:{http_port}", f"{reachable}:{grpc_port}", name)


def _why_not(host: str, port: int, option: str, error: Exception) -> str:
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.EADDRINUSE:
        return f"port {port} on {host} is taken by another program; choose another with {option} (0: any free one)"
    if number == errno.EACCES:
        return f"port {port} needs more rights than this user has; choose one from 1024 on with {option}"
    return f"cannot listen on {host} port {port}: {error}; check --host and {option}"
